"""Ways to multiply rows with the matrices of their blocks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..renamed import grouped_mm
from . import kernels
from .plan import Chunk

MOST_GROUPS = 1023
"""``grouped_mm`` refuses more groups on a CUDA device."""


class Products(Protocol):
    """Matrix products of the pairs of a chunk, block by block."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        """Whether tables (B, G, D) of this kind can be multiplied."""

    def rows_by_matrices(
        self,
        rows_PX: Tensor,
        matrices_BXY: Tensor,
        chunk: Chunk,
        out_PY: Tensor,
        bias_BY: Tensor | None = None,
    ) -> None:
        """Each row times the matrix of its block, plus the bias of its block.

        Args:
            rows_PX: the rows of the chunk.
            matrices_BXY, bias_BY: of all blocks.
            out_PY: takes the result.
        """

    def rows_by_rows(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        """Sum over each block of the outer products of its rows.

        Args:
            out_BXY: takes the result, of all blocks, which is added where the chunk continues a
                block. Blocks without rows are zeroed if they are within the chunk's.
        """

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        """Adds each row to that of its token.

        Args:
            out_ND: takes the sums.
            tokens_P: int32.
        """


class Loop:
    """One ``torch.mm`` a block, straight into place: any dtype and shape. On a CPU nothing is
    allocated, which is faster than a call for all blocks."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return True

    def rows_by_matrices(
        self,
        rows_PX: Tensor,
        matrices_BXY: Tensor,
        chunk: Chunk,
        out_PY: Tensor,
        bias_BY: Tensor | None = None,
    ) -> None:
        groups = rows_PX.split(chunk.sizes), out_PY.split(chunk.sizes)
        matrices = matrices_BXY[chunk.blocks].unbind()
        if bias_BY is None:
            for size, rows, out, matrix in zip(chunk.sizes, *groups, matrices, strict=True):
                if size:
                    torch.mm(rows, matrix, out=out)
        else:
            biases = bias_BY[chunk.blocks].unbind()
            for size, rows, out, matrix, bias in zip(
                chunk.sizes, *groups, matrices, biases, strict=True
            ):
                if size:
                    torch.addmm(bias, rows, matrix, out=out)

    def rows_by_rows(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        lefts = left_PX.t().split(chunk.sizes, dim=1)
        rights, outs = right_PY.split(chunk.sizes), out_BXY[chunk.blocks].unbind()
        if chunk.continues:
            outs[0].addmm_(lefts[0], rights[0])
        start = int(chunk.continues)
        for left, right, out in zip(lefts[start:], rights[start:], outs[start:], strict=True):
            torch.mm(left, right, out=out)  # of no rows: zeros

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        out_ND.index_add_(0, tokens_P, rows_PD)


class Grouped:
    """``torch.nn.functional.grouped_mm``: one call for all blocks of a chunk."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        num_blocks, block_size, width = table_shape
        if device_type != "cpu" and num_blocks > MOST_GROUPS:
            return False
        # grouped_mm wants every row of its operands to start at a multiple of 16 bytes.
        aligned = 16 // dtype.itemsize
        return width % aligned == 0 and block_size % aligned == 0

    def rows_by_matrices(
        self,
        rows_PX: Tensor,
        matrices_BXY: Tensor,
        chunk: Chunk,
        out_PY: Tensor,
        bias_BY: Tensor | None = None,
    ) -> None:
        ends = chunk.ends.to(rows_PX.device)
        out_PY.copy_(grouped_mm(rows_PX, matrices_BXY[chunk.blocks], offs=ends))
        if bias_BY is not None:
            rows_P = torch.arange(len(rows_PX), device=ends.device, dtype=ends.dtype)
            block_P = torch.searchsorted(ends, rows_P, right=True)
            out_PY += bias_BY[chunk.blocks].index_select(0, block_P)

    def rows_by_rows(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        products_BXY = grouped_mm(left_PX.t(), right_PY, offs=chunk.ends.to(left_PX.device))
        if chunk.continues:
            products_BXY[0] += out_BXY[chunk.blocks.start]
        out_BXY[chunk.blocks] = products_BXY

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        out_ND.index_add_(0, tokens_P, rows_PD)


class Native:
    """The kernels of :mod:`.kernels`: the products of a chunk side by side on a CPU's threads."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return device_type == "cpu" and kernels.supported(dtype)

    def rows_by_matrices(
        self,
        rows_PX: Tensor,
        matrices_BXY: Tensor,
        chunk: Chunk,
        out_PY: Tensor,
        bias_BY: Tensor | None = None,
    ) -> None:
        bias_BY = None if bias_BY is None else bias_BY[chunk.blocks]
        kernels.load().rows_by_matrices(
            rows_PX, matrices_BXY[chunk.blocks], chunk.ends, out_PY, bias_BY
        )

    def rows_by_rows(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        kernels.load().rows_by_rows(
            left_PX, right_PY, chunk.ends, out_BXY[chunk.blocks], chunk.continues
        )

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        kernels.load().add_rows(out_ND, tokens_P, rows_PD)


PRODUCTS: dict[str, Products] = {
    "grouped": Grouped(),
    "loop": Loop(),
    "native_loop": Native(),
}
