"""Ways to multiply rows with the matrices of their groups."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED_PAIRS = 4096
"""Pairs whose gathered rows fit a processor's cache, as measured; larger temporaries cost page
faults that outweigh the products."""


class Products(Protocol):
    """Grouped matrix products. P rows are sorted into groups; group i ends at row ``ends_B[i]``."""

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        """Whether tables of this kind can be multiplied."""

    def chunk_pairs(self, device: torch.device, block_size: int) -> int | None:
        """The most rows to hand over at once; ``None``: no limit."""

    def rows_by_matrices(self, rows_PX: Tensor, matrices_BXY: Tensor, ends_B: Tensor) -> Tensor:
        """Each row times the matrix of its group: (P, Y)."""

    def rows_by_rows(self, left_PX: Tensor, right_PY: Tensor, ends_B: Tensor) -> Tensor:
        """Sum over each group of the outer products of its rows: (B, X, Y)."""


class Grouped:
    """``torch.nn.functional.grouped_mm``: one call for all groups."""

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        # grouped_mm wants every row of its operands to start at a multiple of 16 bytes.
        aligned = 16 // dtype.itemsize
        return embed_dim % aligned == 0 and block_size % aligned == 0

    def chunk_pairs(self, device: torch.device, block_size: int) -> int | None:
        return CACHED_PAIRS if device.type == "cpu" else None

    def rows_by_matrices(self, rows_PX: Tensor, matrices_BXY: Tensor, ends_B: Tensor) -> Tensor:
        return F.grouped_mm(rows_PX, matrices_BXY, offs=ends_B)

    def rows_by_rows(self, left_PX: Tensor, right_PY: Tensor, ends_B: Tensor) -> Tensor:
        return F.grouped_mm(left_PX.t(), right_PY, offs=ends_B)


class Loop:
    """One ``torch.mm`` a group: any dtype and shape, the reference for the others."""

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        return True

    def chunk_pairs(self, device: torch.device, block_size: int) -> int | None:
        return CACHED_PAIRS

    def rows_by_matrices(self, rows_PX: Tensor, matrices_BXY: Tensor, ends_B: Tensor) -> Tensor:
        out_PY = rows_PX.new_empty(len(rows_PX), matrices_BXY.shape[2])
        start = 0
        for matrix_XY, end in zip(matrices_BXY, ends_B.tolist(), strict=True):
            if end > start:
                torch.mm(rows_PX[start:end], matrix_XY, out=out_PY[start:end])
            start = end
        return out_PY

    def rows_by_rows(self, left_PX: Tensor, right_PY: Tensor, ends_B: Tensor) -> Tensor:
        out_BXY = left_PX.new_zeros(len(ends_B), left_PX.shape[1], right_PY.shape[1])
        start = 0
        for out_XY, end in zip(out_BXY, ends_B.tolist(), strict=True):
            if end > start:
                torch.mm(left_PX[start:end].t(), right_PY[start:end], out=out_XY)
            start = end
        return out_BXY


class Gathered:
    """Gathers the matrix of each row and multiplies as a batch: for a few tokens, which then touch
    their own blocks only."""

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        return True

    def chunk_pairs(self, device: torch.device, block_size: int) -> int | None:
        return max(1, CACHED_PAIRS // block_size)

    def rows_by_matrices(self, rows_PX: Tensor, matrices_BXY: Tensor, ends_B: Tensor) -> Tensor:
        matrices_PXY = matrices_BXY[_group_of_row(len(rows_PX), ends_B)]
        return torch.bmm(rows_PX.unsqueeze(1), matrices_PXY).squeeze(1)

    def rows_by_rows(self, left_PX: Tensor, right_PY: Tensor, ends_B: Tensor) -> Tensor:
        outer_PXY = left_PX.unsqueeze(2) * right_PY.unsqueeze(1)
        out_BXY = outer_PXY.new_zeros(len(ends_B), *outer_PXY.shape[1:])
        return out_BXY.index_add_(0, _group_of_row(len(left_PX), ends_B), outer_PXY)


def _group_of_row(num_rows: int, ends_B: Tensor) -> Tensor:
    rows_P = torch.arange(num_rows, device=ends_B.device, dtype=ends_B.dtype)
    return torch.searchsorted(ends_B, rows_P, right=True)


PRODUCTS: dict[str, Products] = {"grouped": Grouped(), "loop": Loop(), "gathered": Gathered()}
