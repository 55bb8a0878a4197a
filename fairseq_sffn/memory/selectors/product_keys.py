"""The base class of selectors by product keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import MemoryConfig
from ..product_scores import ProductScores
from ..selection import Selector, SelectorConfig
from ..validation import ConfigError


class ProductKeys(Selector):
    """A query network, and two sets of sub-keys, one for each half of a query.

    The score of cell (l, r) is q1 . left_l + q2 . right_r (Lample et al. 2019, arXiv 1907.05242,
    section 3). The number of cells need not be a square: the sizes of the two sets are its two
    factors closest to the square root.

    The paper normalizes queries by batch norm, under which a token depends on later tokens and on
    padding, and which differs in evaluation. Layer norm over each head's query also spreads the
    queries over the cells, and depends on the token alone.
    """

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        query_dim: int | None = field(
            default=None,
            metadata={"help": "features of a head's query, even (default: half the width)"},
        )
        query_norm: Literal["layer", "none"] = field(
            default="layer",
            metadata={
                "help": "normalisation of each query: layer norm over its features, or none; the "
                "batch norm of Lample et al. 2019 would let a token see later tokens and padding"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.active_blocks = config.active_blocks
        heads, query_dim = self._heads(config), self._query_dim(config)
        left, right = sub_key_counts(config.num_cells)
        self.query = nn.Linear(config.embed_dim, heads * query_dim)
        self.norm = nn.LayerNorm(query_dim) if self._has_norm(config) else nn.Identity()
        self.left = nn.Parameter(torch.empty(heads, left, query_dim // 2))
        self.right = nn.Parameter(torch.empty(heads, right, query_dim // 2))
        bound = (query_dim // 2) ** -0.5
        for sub_keys in (self.left, self.right):
            nn.init.uniform_(sub_keys, -bound, bound)

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 1

    @classmethod
    def _heads(cls, config: MemoryConfig) -> int:
        return 1

    @classmethod
    def _query_dim(cls, config: MemoryConfig) -> int:
        query_dim = config.selector_options.query_dim
        return max(2, config.embed_dim // 4 * 2) if query_dim is None else query_dim

    @classmethod
    def _has_norm(cls, config: MemoryConfig) -> bool:
        return bool(config.selector_options.query_norm == "layer")

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        if config.block_size != 1:
            reason = f"{cls.name} selects single cells, blocks of 1"
            raise ConfigError("block_size", config.block_size, reason)
        query_dim = cls._query_dim(config)
        if query_dim < 2 or query_dim % 2:
            raise ConfigError("query_dim", query_dim, "must be even and positive, to be halved")

    @classmethod
    def num_params(cls, config: MemoryConfig) -> int:
        heads, query_dim = cls._heads(config), cls._query_dim(config)
        norm = 2 * query_dim if cls._has_norm(config) else 0
        sub_keys = heads * query_dim // 2 * sum(sub_key_counts(config.num_cells))
        return (config.embed_dim + 1) * heads * query_dim + norm + sub_keys

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        """Return the FLOPs of query and sub-keys; the sums of candidates' halves do not count."""
        heads, query_dim = cls._heads(config), cls._query_dim(config)
        query = 2 * config.embed_dim * heads * query_dim
        return query + heads * query_dim * sum(sub_key_counts(config.num_cells))

    def scores(self, x_ND: Tensor) -> ProductScores:
        """Return the scores of all cells by each head.

        Args:
            x_ND: hidden states.
        """
        query_NHq = self.norm(self.query(x_ND).unflatten(1, (len(self.left), -1)))
        left_NHq, right_NHq = query_NHq.chunk(2, dim=2)
        return ProductScores(
            torch.einsum("nhq,hlq->nhl", left_NHq, self.left),
            torch.einsum("nhq,hrq->nhr", right_NHq, self.right),
        )


def sub_key_counts(num_cells: int) -> tuple[int, int]:
    """Return the two factors of ``num_cells`` closest to its square root, the smaller first."""
    left = next(n for n in range(math.isqrt(num_cells), 0, -1) if num_cells % n == 0)
    return left, num_cells // left
