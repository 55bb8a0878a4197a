"""AoE: every block computes a part of its pre-activations, and the largest ones select."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compute.selected_products import selected_products
from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, Selector, SelectorConfig, SelectorInput
from ..validation import ConfigError


class AoE(Selector):
    """Top-b blocks by the Euclidean norm of their low-rank pre-activations, without a router.

    Autonomy of experts (Lv et al. 2025, arXiv 2501.13074). The keys of block i are U_i D_i, of rank
    r. Every block computes D_i x, whose norm is its score. The selected blocks go on from there to
    their pre-activations U_i (D_i x) + c_i. The key bias c_i is no part of the score.

    Without factors (r = g, D_i = K_i and U_i the identity) and without key biases it is VanillaM
    with the aggregate ``l2``.

    Attributes:
        down: (B, R, D) the factors D_i.
        up: (B, G, R) the factors U_i.
        bias: (B, G) key biases, or ``None``.
    """

    name = "aoe"
    key_table = "own"

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        rank: int | None = field(
            default=None,
            metadata={
                "help": "rank of a block's keys; by default, the first factors of all blocks cost "
                "what the keys of a dense FFN cost (default: active cells / blocks)"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.active_blocks, self.engine = config.active_blocks, config.engine
        rank, width = self._rank(config), config.embed_dim
        self.down = nn.Parameter(torch.empty(config.num_blocks, rank, width))
        self.up = nn.Parameter(torch.empty(config.num_blocks, config.block_size, rank))
        # D_i keeps the variance of x. With U_i, pre-activations vary as with a full table.
        nn.init.uniform_(self.down, -((3 / width) ** 0.5), (3 / width) ** 0.5)
        bound = config.init_scale * rank**-0.5
        nn.init.uniform_(self.up, -bound, bound)
        self.bias: nn.Parameter | None = None
        if config.bias:
            self.bias = nn.Parameter(torch.empty(config.num_blocks, config.block_size))
            bound = config.init_scale * width**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        """Return half of the FFN's width, as the paper's models use two experts per token."""
        return max(1, ffn_embed_dim // 2)

    @classmethod
    def _rank(cls, config: MemoryConfig) -> int:
        if (rank := config.selector_options.rank) is not None:
            return int(rank)
        most = min(config.block_size, config.embed_dim)
        return min(max(1, config.active_cells // config.num_blocks), most)

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        most = min(config.block_size, config.embed_dim)
        if not 1 <= (rank := cls._rank(config)) <= most:
            reason = f"is not 1 to {most}, the smaller of block size and width"
            raise ConfigError("rank", rank, reason)

    @classmethod
    def num_params(cls, config: MemoryConfig) -> int:
        factors = config.num_blocks * config.embed_dim + config.num_cells
        return cls._rank(config) * factors + config.bias * config.num_cells

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        factors = config.num_blocks * config.embed_dim + config.active_cells
        return 2 * cls._rank(config) * factors

    def forward(self, inputs: SelectorInput) -> Selection:
        low_NBR = F.linear(inputs.x, self.down.flatten(0, 1)).unflatten(1, self.down.shape[:2])
        scored_NBR = low_NBR if inputs.needs_scores else low_NBR.detach()
        scores = Scores(torch.linalg.vector_norm(scored_NBR, dim=2))
        blocks_NA = inputs.top(scores, self.active_blocks)
        return Selection(blocks_NA, scores, pre_activations=self._cells(low_NBR, blocks_NA))

    def _cells(self, low_NBR: Tensor, blocks_NA: Tensor) -> Tensor:
        """Return the pre-activations of the selected blocks: (N, A, G)."""
        dtype, (num_tokens, num_blocks, _) = low_NBR.dtype, low_NBR.shape
        # Not `gather`, which would keep the rows of all blocks for the backward pass.
        firsts_N = torch.arange(num_tokens, device=low_NBR.device) * num_blocks
        rows_P = (firsts_N.unsqueeze(1) + blocks_NA).flatten()
        rows_PR = low_NBR.flatten(0, 1).index_select(0, rows_P)
        bias_BG = None if self.bias is None else self.bias.to(dtype)
        return selected_products(rows_PR, self.up.to(dtype), bias_BG, blocks_NA, self.engine)
