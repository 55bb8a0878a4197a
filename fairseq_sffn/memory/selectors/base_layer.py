"""BASE: balanced assignment of tokens to experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..assignment import balanced_assignment
from ..config import ConfigError, MemoryConfig
from ..selection import Selection, SelectorConfig, SelectorInput
from .learned_gate import LearnedGate


class BASELayer(LearnedGate):
    """In training, the assignment of tokens to blocks that has the highest total score among those
    that load all blocks alike; in evaluation, each token's best block (Lewis et al. 2021, arXiv
    2103.16716). A block's output is weighed by the logistic function of its score.

    The training assignment sees all tokens of the micro-batch: which block a token gets depends on
    the others, on later ones too. Evaluation is causal. Padding is left out of the balance, and
    goes to its best block.

    In several processes each assigns its own tokens, as in fairseq's BASE layer, or all assign the
    tokens of all, each the same way.

    The assignment is computed on the host, whatever the device: each of its hundreds of steps
    depends on the numbers of the one before. In training the host waits for an accelerator once a
    layer, to copy the scores, and with scope ``world`` once more, to learn how many tokens each
    process has. The accelerator is idle meanwhile.
    """

    name = "base"
    default_gate = "sigmoid"

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        scope: Literal["process", "world"] = field(
            default="process",
            metadata={
                "help": "tokens that are assigned together, with equal load: those of one "
                "'process', as in fairseq's BASE layer, or of all processes ('world'; its time "
                "grows with the number of processes)"
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
        scores_NB = selection.scores.logits.detach()
        valid_N = scores_NB.new_ones(len(scores_NB)) if inputs.valid is None else inputs.valid
        # Scores and padding in one tensor, so that the host waits for one copy.
        rows = torch.cat([scores_NB, valid_N.to(scores_NB.dtype).unsqueeze(1)], dim=1)
        own = slice(0, len(rows))
        if self.scope == "world":
            rows, own = inputs.gather_tokens(rows)
        rows = rows.cpu()
        blocks = balanced_assignment(rows[:, :-1], valid_N=rows[:, -1] > 0)
        # The way back needs no wait: the copy is staged before the call returns.
        blocks_N1 = blocks[own].to(scores_NB.device, non_blocking=True).unsqueeze(1)
        if inputs.valid is not None:
            blocks_N1 = blocks_N1.where(inputs.valid.unsqueeze(1), selection.blocks)
        return selection._replace(blocks=blocks_N1)
