"""VanillaM: scores every cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compute.embedding_bag import dot_rows
from ..compute.embedding_bag_kernels import RowOrder, choose_embedding_bag
from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, Selector, SelectorConfig, SelectorInput

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda pre_NBG: pre_NBG.mean(dim=2),
    "avg_abs": lambda pre_NBG: pre_NBG.abs().mean(dim=2),
    "max": lambda pre_NBG: pre_NBG.amax(dim=2),
    "min": lambda pre_NBG: pre_NBG.amin(dim=2),
    "l2": lambda pre_NBG: torch.linalg.vector_norm(pre_NBG, dim=2),
}
"""Name -> function from pre-activations (N, B, G) to scores of blocks (N, B)."""

SCORED_AT_ONCE = 2**21
"""Number of pre-activations formed at a time, if only the selected ones are kept: as many as fit in
a processor's cache."""

SCORED_AT_ONCE_ON_ACCELERATORS = 2**28
"""The same on accelerators: large matrix products with a bounded amount of memory."""


class VanillaM(Selector):
    """Top-b blocks by an aggregate of their pre-activations x . k + c, all of which are computed.

    Liu et al. 2023 (arXiv 2305.13999). With blocks of one cell, the default, it selects the cells
    with the highest pre-activations.
    """

    name = "vanilla_m"
    scores_every_key = True

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        aggregate: Literal["avg", "avg_abs", "max", "min", "l2"] = field(
            default="avg",
            metadata={
                "help": "score of a block: the mean, the mean absolute value, the maximum, the "
                "minimum or the Euclidean norm of its cells' pre-activations"
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
        x_ND, keys_CD, bias_C = self.factors(inputs)
        if not inputs.needs_scores:
            return self._select(inputs, x_ND, keys_CD, bias_C)
        pre_NBG = F.linear(x_ND, keys_CD, bias_C).unflatten(1, (-1, self.block_size))
        scores = Scores(aggregated(pre_NBG, self.aggregate))
        blocks_NA = inputs.top(scores, self.active_blocks)
        return Selection(blocks_NA, scores, pre_activations=_of_blocks(pre_NBG, blocks_NA))

    def factors(self, inputs: SelectorInput) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x (N, D), keys (C, D) and key bias (C,) of the pre-activations x . k + c."""
        assert inputs.keys is not None
        return inputs.x, inputs.keys, inputs.key_bias

    def _select(
        self, inputs: SelectorInput, x_ND: Tensor, keys_CD: Tensor, bias_C: Tensor | None
    ) -> Selection:
        """Select without keeping the scores, a few tokens at a time.

        Gradients flow through the selected cells only, not through zeros for all others.
        """
        if torch.is_autocast_enabled(x_ND.device.type):
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            x_ND, keys_CD = x_ND.to(dtype), keys_CD.to(dtype)
            bias_C = None if bias_C is None else bias_C.to(dtype)
        on_cpu = x_ND.device.type == "cpu"
        at_once = SCORED_AT_ONCE if on_cpu else SCORED_AT_ONCE_ON_ACCELERATORS
        blocks, known = [], []
        with torch.no_grad():
            for x_nD in x_ND.split(max(1, at_once // len(keys_CD))):
                pre_nBG = F.linear(x_nD, keys_CD, bias_C).unflatten(1, (-1, self.block_size))
                scores = Scores(aggregated(pre_nBG, self.aggregate))
                blocks.append(inputs.top(scores, self.active_blocks))
                known.append(_of_blocks(pre_nBG, blocks[-1]).flatten(1))
        blocks_NA, known_NK = torch.cat(blocks), torch.cat(known)
        keys_BGD = keys_CD.unflatten(0, (-1, self.block_size))
        bias_BG = None if bias_C is None else bias_C.unflatten(0, (-1, self.block_size))
        sizes = len(x_ND), self.active_blocks, len(keys_BGD)
        kernels = choose_embedding_bag(x_ND.device.type, x_ND.dtype, *sizes)
        pre_NK = dot_rows(x_ND, keys_BGD, bias_BG, blocks_NA, RowOrder(), kernels, known_NK)
        pre_NAG = pre_NK.view(*blocks_NA.shape, self.block_size)
        return Selection(blocks_NA, pre_activations=pre_NAG)


def scores_are_cells(block_size: int, aggregate: str) -> bool:
    """Return whether the score of a block is the pre-activation of its one cell."""
    return block_size == 1 and aggregate not in ("avg_abs", "l2")


def aggregated(pre_NBG: Tensor, aggregate: str) -> Tensor:
    """Return the score of each block from the pre-activations of its cells: (N, B)."""
    if scores_are_cells(pre_NBG.shape[2], aggregate):  # saves a copy of a large tensor
        return pre_NBG.squeeze(2)
    return AGGREGATES[aggregate](pre_NBG)


def _of_blocks(pre_NBG: Tensor, blocks_NA: Tensor) -> Tensor:
    """Return the pre-activations of the given blocks: (N, A, G)."""
    return pre_NBG.gather(1, blocks_NA.unsqueeze(2).expand(-1, -1, pre_NBG.shape[2]))
