"""BASE layer: balanced assignment of tokens to experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..assignment import balanced_assignment
from ..config import MemoryConfig
from ..selection import Selection, SelectorConfig, SelectorInput
from ..validation import ConfigError
from .learned_gate import LearnedGate


class BASELayer(LearnedGate):
    """Balanced assignment in training, each token's best block in evaluation.

    Lewis et al. 2021 (arXiv 2103.16716). In training, all blocks get the same number of tokens, and
    the total score is the highest under this constraint. The output of a block is multiplied by
    the logistic function of its score.

    In training, the block of a token depends on all tokens of the micro-batch, including later
    ones. Evaluation is causal. Padding is left out of the balance and goes to its best block.

    In several processes, each process assigns its own tokens, as in fairseq's BASE layer, or every
    process assigns the tokens of all processes (option ``scope``).

    The host computes the assignment: each of its hundreds of steps depends on the numbers of the
    previous step. In training, the host waits for an accelerator once per layer, to copy the
    scores, and with scope ``world`` once more, to learn the number of tokens of each process. The
    accelerator is idle meanwhile.
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
        if config.balance_rate:
            reason = "base balances the load by its assignment"
            raise ConfigError("balance_rate", config.balance_rate, reason)

    def forward(self, inputs: SelectorInput) -> Selection:
        selection = super().forward(inputs)
        if not self.training:
            return selection
        assert selection.scores is not None
        scores_NB = selection.scores.logits.detach()
        valid_N = scores_NB.new_ones(len(scores_NB)) if inputs.valid is None else inputs.valid
        # One tensor with scores and padding, so that the host waits for one copy.
        rows = torch.cat([scores_NB, valid_N.to(scores_NB.dtype).unsqueeze(1)], dim=1)
        own = slice(0, len(rows))
        if self.scope == "world":
            rows, own = inputs.gather_tokens(rows)
        rows = rows.cpu()
        blocks = balanced_assignment(rows[:, :-1], valid_N=rows[:, -1] > 0)
        # The copy back does not wait: it is staged before the call returns.
        blocks_N1 = blocks[own].to(scores_NB.device, non_blocking=True).unsqueeze(1)
        if inputs.valid is not None:
            blocks_N1 = blocks_N1.where(inputs.valid.unsqueeze(1), selection.blocks)
        return selection._replace(blocks=blocks_N1)
