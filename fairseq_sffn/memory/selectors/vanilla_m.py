"""VanillaM: every cell is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, Selector, SelectorConfig, SelectorInput

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda pre_NBG: pre_NBG.mean(dim=2),
    "avg_abs": lambda pre_NBG: pre_NBG.abs().mean(dim=2),
    "max": lambda pre_NBG: pre_NBG.amax(dim=2),
    "min": lambda pre_NBG: pre_NBG.amin(dim=2),
}
"""Name -> score (N, B) of the blocks whose cells have pre-activations (N, B, G)."""


class VanillaM(Selector):
    """Top-b blocks by an aggregate of their own pre-activations x . k + c, all of which are
    computed (Liu et al. 2023, arXiv 2305.13999). With blocks of one cell, the default,
    the cells with the highest pre-activations."""

    name = "vanilla_m"
    scores_every_key = True

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        aggregate: Literal["avg", "avg_abs", "max", "min"] = field(
            default="avg",
            metadata={
                "help": "a block's score: of its cells' pre-activations the mean, mean absolute "
                "value, the maximum or the minimum"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.aggregate = config.selector_options.aggregate  # by name: a lambda does not pickle
        self.block_size, self.active_blocks = config.block_size, config.active_blocks

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 1

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        # The active cells' pre-activations are used again.
        return 2 * (config.num_cells - config.active_cells) * config.embed_dim

    def forward(self, inputs: SelectorInput) -> Selection:
        pre_NBG = self.pre_activations(inputs).unflatten(1, (-1, self.block_size))
        scores = Scores(AGGREGATES[self.aggregate](pre_NBG))
        blocks_NA = scores.top(self.active_blocks)
        pre_NAG = pre_NBG.gather(1, blocks_NA.unsqueeze(2).expand(-1, -1, self.block_size))
        return Selection(blocks_NA, scores, pre_activations=pre_NAG)

    def pre_activations(self, inputs: SelectorInput) -> Tensor:
        """x . k + c of every cell: (N, C)."""
        assert inputs.keys is not None
        return F.linear(inputs.x, inputs.keys, inputs.key_bias)
