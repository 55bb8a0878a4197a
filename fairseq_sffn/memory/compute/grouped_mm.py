"""Matrix products of groups of rows, one group for each block, in three implementations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..renamed import grouped_mm
from . import kernels
from .chunks import Chunk

MOST_GROUPS = 1023
"""Maximum number of groups that PyTorch's ``grouped_mm`` accepts on a CUDA device."""


class GroupedMM(Protocol):
    """Multiplies the rows of a chunk's assignments, block by block."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        """Return whether tables of this dtype and shape (B, G, D) can be multiplied."""

    def grouped_mm(
        self,
        rows_PX: Tensor,
        matrices_BXY: Tensor,
        chunk: Chunk,
        out_PY: Tensor,
        bias_BY: Tensor | None = None,
    ) -> None:
        """Multiply each row by the matrix of its block and add the bias of its block.

        Args:
            rows_PX: rows of the chunk's assignments.
            matrices_BXY: matrices of all blocks.
            chunk: which assignments belong to which block.
            out_PY: receives the result.
            bias_BY: biases of all blocks.
        """

    def grouped_mm_transposed(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        """Multiply the transposed left rows of each block by its right rows.

        Args:
            left_PX: left rows of the chunk's assignments.
            right_PY: right rows of the chunk's assignments.
            chunk: which assignments belong to which block.
            out_BXY: receives the products of all blocks. If the chunk continues a block, the
                product of this block is added to what is there. Blocks of the chunk without rows
                receive zeros.
        """

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        """Add each row to the row of its token.

        Args:
            out_ND: receives the sums.
            tokens_P: int32 token of each row.
            rows_PD: rows to add.
        """


class LoopMM:
    """One ``torch.mm`` for each block, written in place: any dtype and shape.

    On a CPU this is faster than one call for all blocks, because nothing is allocated.
    """

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return True

    def grouped_mm(
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

    def grouped_mm_transposed(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        lefts = left_PX.t().split(chunk.sizes, dim=1)
        rights, outs = right_PY.split(chunk.sizes), out_BXY[chunk.blocks].unbind()
        if chunk.continues:
            outs[0].addmm_(lefts[0], rights[0])
        start = int(chunk.continues)
        for left, right, out in zip(lefts[start:], rights[start:], outs[start:], strict=True):
            torch.mm(left, right, out=out)  # zeros if the block has no rows

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        out_ND.index_add_(0, tokens_P, rows_PD)


class TorchGroupedMM:
    """``torch.nn.functional.grouped_mm``: one call for all blocks of a chunk."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        num_blocks, block_size, width = table_shape
        if device_type != "cpu" and num_blocks > MOST_GROUPS:
            return False
        # PyTorch requires every row of the operands to start at a multiple of 16 bytes.
        aligned = 16 // dtype.itemsize
        return width % aligned == 0 and block_size % aligned == 0

    def grouped_mm(
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

    def grouped_mm_transposed(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        products_BXY = grouped_mm(left_PX.t(), right_PY, offs=chunk.ends.to(left_PX.device))
        if chunk.continues:
            products_BXY[0] += out_BXY[chunk.blocks.start]
        out_BXY[chunk.blocks] = products_BXY

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        out_ND.index_add_(0, tokens_P, rows_PD)


class NativeMM:
    """The C++ kernels of :mod:`.kernels`: a CPU's threads multiply the blocks of a chunk."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return device_type == "cpu" and kernels.supported(dtype)

    def grouped_mm(
        self,
        rows_PX: Tensor,
        matrices_BXY: Tensor,
        chunk: Chunk,
        out_PY: Tensor,
        bias_BY: Tensor | None = None,
    ) -> None:
        bias_BY = None if bias_BY is None else bias_BY[chunk.blocks]
        kernels.load().grouped_mm(rows_PX, matrices_BXY[chunk.blocks], chunk.ends, out_PY, bias_BY)

    def grouped_mm_transposed(
        self, left_PX: Tensor, right_PY: Tensor, chunk: Chunk, out_BXY: Tensor
    ) -> None:
        kernels.load().grouped_mm_transposed(
            left_PX, right_PY, chunk.ends, out_BXY[chunk.blocks], chunk.continues
        )

    def add_rows(self, out_ND: Tensor, tokens_P: Tensor, rows_PD: Tensor) -> None:
        kernels.load().add_rows(out_ND, tokens_P, rows_PD)


GROUPED_MMS: dict[str, GroupedMM] = {
    "grouped": TorchGroupedMM(),
    "loop": LoopMM(),
    "native_loop": NativeMM(),
}
