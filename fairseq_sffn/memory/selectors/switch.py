"""Switch: a learned gate with one expert."""

from .learned_gate import LearnedGate


class Switch(LearnedGate):
    """Top-b blocks of a learned linear gate, multiplied by their probabilities.

    By default b is 1. Fedus et al. 2021 (arXiv 2101.03961, section 2.1).
    """

    name = "switch"
    default_gate = "softmax"
    default_balance_weight = 0.01
