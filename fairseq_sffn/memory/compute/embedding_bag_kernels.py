"""Sums of table rows and dot products with them, in three implementations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .chunks import sort_blocks

_SUM = 0
"""Code of ``mode="sum"`` in PyTorch's embedding bag kernels."""


class RowOrder:
    """Assignments sorted by block or by cell. The gradients of keys and values share the result."""

    def __init__(self) -> None:
        self._order: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, index_NA: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the assignments by the row that they use; the first call computes the result.

        Args:
            index_NA: block or cell numbers below ``num_rows``.
            num_rows: number of blocks or cells.

        Returns:
            (P,) the index n * A + a of each sorted assignment, (P,) its token n, and (num_rows,)
            the start of each row's assignments.
        """
        if self._order is None:
            sorted_P, order_P = sort_blocks(index_NA.flatten(), num_rows)
            rows_C = torch.arange(num_rows, device=sorted_P.device, dtype=sorted_P.dtype)
            tokens_P = order_P.div(max(index_NA.shape[1], 1), rounding_mode="floor")
            self._order = order_P, tokens_P, torch.searchsorted(sorted_P, rows_C)
        return self._order


class EmbeddingBagKernels(Protocol):
    """Implementation of sums and dot products over the K = A * G table rows that a token uses."""

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        """Return whether the implementation computes in this dtype on this device."""

    def dots(
        self, x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, blocks_NA: Tensor
    ) -> Tensor:
        """Compute x . row + bias for the rows of each token's blocks: (N * K,), not a view."""

    def sums(self, weights_NK: Tensor, table_BGD: Tensor, blocks_NA: Tensor) -> Tensor:
        """Sum weight * row over the rows of each token's blocks: (N, D)."""

    def table_sums(
        self, weights_NK: Tensor, x_ND: Tensor, blocks_NA: Tensor, order: RowOrder, num_blocks: int
    ) -> Tensor:
        """Sum weight * x over the tokens that use each row: (B, G, D)."""


class TorchEmbeddingBag:
    """PyTorch's ``embedding_bag``, on any device and in any dtype.

    Its gradients are computed here. PyTorch's own gradient adds one row at a time, which is
    several times slower on a CPU.
    """

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        return True

    def dots(
        self, x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, blocks_NA: Tensor
    ) -> Tensor:
        # The dot products are the gradients of an embedding bag's weights. PyTorch's kernel for
        # them is private. Autograd would compute the bag too, and fails in inference mode.
        cells_NK = cells_of(blocks_NA, table_BGD.shape[1])
        num_tokens, active = cells_NK.shape
        tokens_N = torch.arange(num_tokens, device=x_ND.device)
        cells_P = cells_NK.flatten()
        dots_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_ND.contiguous(),
            table_BGD.flatten(0, 1).contiguous(),
            cells_P,
            tokens_N * active,
            tokens_N.repeat_interleave(active, output_size=num_tokens * active),
            _SUM,
        )
        if bias_BG is not None:
            dots_P += bias_BG.flatten().index_select(0, cells_P)
        return dots_P

    def sums(self, weights_NK: Tensor, table_BGD: Tensor, blocks_NA: Tensor) -> Tensor:
        cells_NK = cells_of(blocks_NA, table_BGD.shape[1])
        table_CD = table_BGD.flatten(0, 1)
        return F.embedding_bag(cells_NK, table_CD, per_sample_weights=weights_NK, mode="sum")

    def table_sums(
        self, weights_NK: Tensor, x_ND: Tensor, blocks_NA: Tensor, order: RowOrder, num_blocks: int
    ) -> Tensor:
        block_size = weights_NK.shape[1] // blocks_NA.shape[1]
        cells_NK = cells_of(blocks_NA, block_size)
        order_P, tokens_P, starts_C = order.of(cells_NK, num_blocks * block_size)
        weights_P = weights_NK.flatten()[order_P]
        sums_CD = F.embedding_bag(
            tokens_P, x_ND, starts_C, per_sample_weights=weights_P, mode="sum"
        )
        return sums_CD.unflatten(0, (num_blocks, block_size))


class NativeEmbeddingBag:
    """The C++ kernels of :mod:`.kernels`, which skip rows of weight 0, such as those after relu."""

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        return device_type == "cpu" and kernels.supported(dtype)

    def dots(
        self, x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, blocks_NA: Tensor
    ) -> Tensor:
        return kernels.load().dots.default(x_ND, table_BGD, bias_BG, blocks_NA)

    def sums(self, weights_NK: Tensor, table_BGD: Tensor, blocks_NA: Tensor) -> Tensor:
        return kernels.load().sums.default(weights_NK, table_BGD, blocks_NA)

    def table_sums(
        self, weights_NK: Tensor, x_ND: Tensor, blocks_NA: Tensor, order: RowOrder, num_blocks: int
    ) -> Tensor:
        block_size = weights_NK.shape[1] // blocks_NA.shape[1]
        table_sums = kernels.load().table_sums.default
        return table_sums(weights_NK, x_ND, *order.of(blocks_NA, num_blocks), block_size)


class MaskedMatmul:
    """Matrix products with the whole table, masked to the cells that each token uses.

    On an accelerator this is faster than gathering a large part of the rows one by one.
    """

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        return True

    def dots(
        self, x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, blocks_NA: Tensor
    ) -> Tensor:
        table_CD, bias_C = table_BGD.flatten(0, 1), None if bias_BG is None else bias_BG.flatten()
        cells_NK = cells_of(blocks_NA, table_BGD.shape[1])
        each = _tokens_at_once(len(table_CD))
        dots = [
            F.linear(x_nD, table_CD, bias_C).gather(1, cells_nK).flatten()
            for x_nD, cells_nK in zip(x_ND.split(each), cells_NK.split(each), strict=True)
        ]
        return torch.cat(dots)

    def sums(self, weights_NK: Tensor, table_BGD: Tensor, blocks_NA: Tensor) -> Tensor:
        table_CD = table_BGD.flatten(0, 1)
        masked = _masked(weights_NK, blocks_NA, *table_BGD.shape[:2])
        sums = [weights_nC @ table_CD for weights_nC in masked]
        return torch.cat(sums) if len(sums) > 1 else sums[0]

    def table_sums(
        self, weights_NK: Tensor, x_ND: Tensor, blocks_NA: Tensor, order: RowOrder, num_blocks: int
    ) -> Tensor:
        block_size = weights_NK.shape[1] // blocks_NA.shape[1]
        each = _tokens_at_once(num_blocks * block_size)
        masked = _masked(weights_NK, blocks_NA, num_blocks, block_size)
        products = (w_nC.t() @ x_nD for w_nC, x_nD in zip(masked, x_ND.split(each), strict=True))
        sums_CD, wide = next(products), torch.promote_types(x_ND.dtype, torch.float32)
        for product_CD in products:
            sums_CD = sums_CD.to(wide).add_(product_CD)
        return sums_CD.to(x_ND.dtype).unflatten(0, (num_blocks, block_size))


def _tokens_at_once(num_cells: int) -> int:
    """Number of tokens whose products with the whole table are formed together."""
    return max(1, MASKED_ELEMENTS // num_cells)


def _masked(
    weights_NK: Tensor, blocks_NA: Tensor, num_blocks: int, block_size: int
) -> Iterator[Tensor]:
    """Yield the weights of all cells, (n, C), for some tokens at a time; unused cells have 0."""
    num_cells = num_blocks * block_size
    each = _tokens_at_once(num_cells)
    cells_NK = cells_of(blocks_NA, block_size)
    for weights_nK, cells_nK in zip(weights_NK.split(each), cells_NK.split(each), strict=True):
        masked = weights_nK.new_zeros(len(weights_nK) * num_cells)
        first_n1 = torch.arange(len(weights_nK), device=masked.device).unsqueeze(1) * num_cells
        # PyTorch adds deterministically only in one dimension.
        masked.scatter_add_(0, (first_n1 + cells_nK).flatten(), weights_nK.flatten())
        yield masked.view(-1, num_cells)


EMBEDDING_BAGS: dict[str, EmbeddingBagKernels] = {
    "embedding_bag": TorchEmbeddingBag(),
    "native_embedding_bag": NativeEmbeddingBag(),
    "masked": MaskedMatmul(),
}

MASKED_ELEMENTS = 2**28
"""Approximate number of elements of a product with the whole table that is formed at a time."""

MASKED_SHARE = 64
"""If a token uses at least 1 row in this many, a product with the whole table takes a GPU less
time than gathering the rows. Computed for an H100: about 170 FLOPs per byte, less the bandwidth
that gathers lose against a stream."""


def pays_to_mask(num_tokens: int, active_blocks: int, num_blocks: int) -> bool:
    """Return whether an accelerator multiplies the whole table faster than it gathers rows."""
    is_large_part = active_blocks * MASKED_SHARE >= num_blocks
    return is_large_part and num_tokens * active_blocks >= num_blocks


def choose_embedding_bag(
    device_type: str, dtype: torch.dtype, num_tokens: int, active_blocks: int, num_blocks: int
) -> EmbeddingBagKernels:
    """Return the fastest implementation for this device, dtype and these sizes."""
    if device_type != "cpu":
        masks = pays_to_mask(num_tokens, active_blocks, num_blocks)
        return EMBEDDING_BAGS["masked" if masks else "embedding_bag"]
    native = EMBEDDING_BAGS["native_embedding_bag"]
    return native if native.supports(device_type, dtype) else EMBEDDING_BAGS["embedding_bag"]


def cells_of(blocks_NA: Tensor, block_size: int) -> Tensor:
    """Return the cells of the given blocks, block by block: (N, A * G)."""
    if block_size == 1:
        return blocks_NA
    within_G = torch.arange(block_size, device=blocks_NA.device)
    return (blocks_NA.unsqueeze(2) * block_size + within_G).flatten(1)
