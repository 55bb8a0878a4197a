"""Gates: the weight of a selected block, from the scores."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .scores import ELEMENTWISE, Scores, at_least_fp32, normalized


class Gate(NamedTuple):
    """The weight of a selected block: a function of its logit, raw or renormalised.

    Weights are in fp32 at least, also under autocast.

    Attributes:
        score: the function of the logits: ``softmax`` over all blocks, or ``sigmoid`` or
            ``sqrt_softplus`` of each logit.
        renormalized: whether a weight is divided by the sum over the token's selected blocks. With
            product keys these are the blocks of all heads, and a block that two heads selected
            counts twice.
    """

    score: Literal["softmax", "sigmoid", "sqrt_softplus"]
    renormalized: bool

    def weights(self, scores: Scores, blocks_NA: Tensor) -> Tensor:
        """Return the weights of the selected blocks: (N, A).

        Args:
            scores: of all blocks.
            blocks_NA: the selected blocks.
        """
        if self.score == "softmax" and not self.renormalized:
            return scores.log_probs(blocks_NA).exp()
        logits_NA = at_least_fp32(scores.of(blocks_NA))
        if self.score == "softmax":
            return torch.softmax(logits_NA, dim=-1)
        weights_NA = ELEMENTWISE[self.score](logits_NA)
        if self.renormalized:
            weights_NA = normalized(weights_NA)
        return weights_NA


GATES: dict[str, Gate | None] = {
    "none": None,
    # Fedus et al. 2021 (arXiv 2101.03961), eqs. 1 and 2.
    "softmax": Gate("softmax", renormalized=False),
    # Lepikhin et al. 2020 (arXiv 2006.16668), algorithm 1.
    "renormalized": Gate("softmax", renormalized=True),
    # Lewis et al. 2021 (arXiv 2103.16716); Csordas et al. 2023 (arXiv 2310.10837).
    "sigmoid": Gate("sigmoid", renormalized=False),
    # DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    "sigmoid_renormalized": Gate("sigmoid", renormalized=True),
    # DeepSeek-V4, as in transformers.
    "sqrt_softplus": Gate("sqrt_softplus", renormalized=False),
    "sqrt_softplus_renormalized": Gate("sqrt_softplus", renormalized=True),
}
"""Name of a gate -> the gate; ``None``: blocks have no weights."""


def score_function(name: str) -> Literal["logits", "softmax", "sigmoid", "sqrt_softplus"]:
    """Return the function of the logits that a gate weighs blocks by.

    Args:
        name: a key of ``GATES``. Without a gate the result is ``logits``.
    """
    gate = GATES[name]
    return "logits" if gate is None else gate.score


def learns(name: str, active_blocks: int) -> bool:
    """Return whether gradients flow through a gate to the scores.

    A single renormalised weight is always 1, so it has no gradient.

    Args:
        name: a key of ``GATES``.
        active_blocks: blocks per token.
    """
    gate = GATES[name]
    return gate is not None and not (gate.renormalized and active_blocks == 1)
