"""BASE: balanced assignment of tokens to experts."""

from __future__ import annotations

from ..assignment import balanced_assignment
from ..config import ConfigError, MemoryConfig
from ..selection import Selection, SelectorInput
from .learned_gate import LearnedGate


class Base(LearnedGate):
    """In training, the assignment of tokens to blocks that has the highest total score among those
    that load all blocks alike; in evaluation, each token's best block (Lewis et al. 2021, arXiv
    2103.16716). A block's output is weighed by the logistic function of its score.

    The training assignment sees all tokens of the micro-batch: which block a token gets depends on
    the others, on later ones too. Evaluation is causal. Padding is left out of the balance, and
    goes to its best block.
    """

    name = "base"
    default_gate = "sigmoid"

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        if config.active_blocks != 1:
            raise ConfigError("active_blocks", config.active_blocks, "base assigns one block")

    def forward(self, inputs: SelectorInput) -> Selection:
        selection = super().forward(inputs)
        if not self.training:
            return selection
        assert selection.scores is not None
        scores_NB = selection.scores.logits.detach()
        if inputs.valid is None:
            blocks_N = balanced_assignment(scores_NB)
        else:
            valid_n = inputs.valid.nonzero().squeeze(1)
            blocks_N = selection.blocks.squeeze(1).clone()
            blocks_N[valid_n] = balanced_assignment(scores_NB[valid_n])
        return selection._replace(blocks=blocks_N.unsqueeze(1))
