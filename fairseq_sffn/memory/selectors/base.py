"""BASE: balanced assignment of tokens to experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..assignment import balanced_assignment
from ..config import ConfigError, MemoryConfig
from ..selection import Selection, SelectorConfig, SelectorInput
from .learned_gate import LearnedGate


class Base(LearnedGate):
    """In training, the assignment of tokens to blocks that has the highest total score among those
    that load all blocks alike; in evaluation, each token's best block (Lewis et al. 2021, arXiv
    2103.16716). A block's output is weighed by the logistic function of its score.

    The training assignment sees all tokens of the micro-batch: which block a token gets depends on
    the others, on later ones too. Evaluation is causal. Padding is left out of the balance, and
    goes to its best block.

    In several processes each assigns its own tokens, as in fairseq's BASE layer, or all assign the
    tokens of all, each the same way.
    """

    name = "base"
    default_gate = "sigmoid"

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        scope: Literal["process", "world"] = field(
            default="process",
            metadata={
                "help": "whose tokens load all blocks alike: those of each 'process', or of all of "
                "them together ('world'), which every process assigns: time grows with their number"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.scope = config.selector_options.scope

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        if config.active_blocks != 1:
            raise ConfigError("active_blocks", config.active_blocks, "base assigns one block")

    def forward(self, inputs: SelectorInput) -> Selection:
        selection = super().forward(inputs)
        if not self.training:
            return selection
        assert selection.scores is not None
        scores_nB, valid_n = selection.scores.logits.detach(), None
        if inputs.valid is not None:
            valid_n = inputs.valid.nonzero().squeeze(1)
            scores_nB = scores_nB[valid_n]
        if self.scope == "world":
            scores_nB, own = inputs.gather_tokens(scores_nB)
            blocks_n = balanced_assignment(scores_nB)[own]
        else:
            blocks_n = balanced_assignment(scores_nB)
        if valid_n is not None:
            blocks_n = selection.blocks.squeeze(1).index_copy(0, valid_n, blocks_n)
        return selection._replace(blocks=blocks_n.unsqueeze(1))
