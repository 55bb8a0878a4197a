"""GShard: a learned gate with two experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..config import MemoryConfig
from ..selection import Selection, SelectorConfig, SelectorInput
from ..validation import ConfigError
from .learned_gate import LearnedGate


class GShard(LearnedGate):
    """Top-b blocks of a learned linear gate, by default two of half the FFN's width.

    The outputs are multiplied by the blocks' probabilities, renormalized to sum to 1 (Lepikhin et
    al. 2020, arXiv 2006.16668, algorithm 1). The balance loss counts first choices only.

    With a capacity factor, a block keeps its weight if the token's other block is full. fairscale's
    ``Top2Gate`` renormalizes over the remaining blocks, so that the weight becomes 1.

    The experts of the paper are as wide as the FFN, so that a token uses two FFNs: see
    ``transformer_lm_gshard_8d``.
    """

    name = "gshard"
    default_gate = "renormalized"
    default_balance_weight = 0.01
    balanced_choices = 1

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        second_expert: Literal["all", "sampled"] = field(
            default="all",
            metadata={
                "help": "'all': every token uses its second block; 'sampled': in training, a token "
                "uses it with probability min(1, 2 * its weight), as in the paper; needs two "
                "active blocks"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.samples_second = config.selector_options.second_expert == "sampled"

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return max(1, ffn_embed_dim // 2)

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        if config.active_blocks < 2:
            reason = "gshard weighs blocks against each other and needs two; use switch for one"
            raise ConfigError("active_blocks", config.active_blocks, reason)
        if config.selector_options.second_expert == "sampled" and config.active_blocks != 2:
            reason = f"is for two active blocks, not {config.active_blocks}"
            raise ConfigError("second_expert", "sampled", reason)

    def forward(self, inputs: SelectorInput) -> Selection:
        selection = super().forward(inputs)
        if not (self.training and self.samples_second):
            return selection
        assert selection.scores is not None
        with torch.no_grad():
            weights_NA = selection.scores.of(selection.blocks).softmax(dim=-1)
            kept_NA = 2 * weights_NA > torch.rand_like(
                weights_NA
            )  # always true for the first choice
        return selection._replace(kept=kept_NA)
