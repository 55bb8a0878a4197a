"""Sums and products of the rows of a table that each token uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .plan import sort_blocks

_SUM = 0
"""The number of ``mode="sum"`` in PyTorch's kernels."""


class RowOrder:
    """Pairs in the order of the blocks, or cells, that they use; the gradients of keys and values
    share it."""

    def __init__(self) -> None:
        self._order: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, index_NA: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions in the flattened index, by what it names (P,), the token of each (P,), and
        where the pairs of each of the ``num_rows`` start."""
        if self._order is None:
            sorted_P, order_P = sort_blocks(index_NA.flatten(), num_rows)
            rows_C = torch.arange(num_rows, device=sorted_P.device, dtype=sorted_P.dtype)
            tokens_P = order_P.div(max(index_NA.shape[1], 1), rounding_mode="floor")
            self._order = order_P, tokens_P, torch.searchsorted(sorted_P, rows_C)
        return self._order


class BagKernels(Protocol):
    """Sums and products of the rows of a table (B, G, D) that tokens use. K = A * G."""

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        """Whether numbers of this kind can be added up."""

    def dots(
        self, x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, blocks_NA: Tensor
    ) -> Tensor:
        """x . row + bias for each row of a token's blocks: (N * K,), no view."""

    def sums(self, weights_NK: Tensor, table_BGD: Tensor, blocks_NA: Tensor) -> Tensor:
        """The rows of a token's blocks, each times its weight, added up: (N, D)."""

    def table_sums(
        self, weights_NK: Tensor, x_ND: Tensor, blocks_NA: Tensor, order: RowOrder, num_blocks: int
    ) -> Tensor:
        """For each row the sum of weight * x over the tokens that use it: (B, G, D)."""


class TorchBags:
    """By ``embedding_bag``: on any device, in any dtype.

    (PyTorch's own gradient of it adds one pair at a time, several times slower on a CPU.)
    """

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        return True

    def dots(
        self, x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, blocks_NA: Tensor
    ) -> Tensor:
        # They are the gradients of the weights of a bag. PyTorch's kernel for them has no public
        # name, and to ask autograd for it costs the bag as well and fails in inference mode.
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


class NativeBags:
    """By the kernels of :mod:`.kernels`, which pass by rows without weight, such as those that
    relu has silenced."""

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


class MaskedBags:
    """By products with the whole table, of which a token's part is read, or which is multiplied by
    zeros elsewhere: on an accelerator faster than gathering a large part of the rows one by one."""

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
        return torch.cat([weights_nC @ table_CD for weights_nC in masked])

    def table_sums(
        self, weights_NK: Tensor, x_ND: Tensor, blocks_NA: Tensor, order: RowOrder, num_blocks: int
    ) -> Tensor:
        block_size = weights_NK.shape[1] // blocks_NA.shape[1]
        num_cells = num_blocks * block_size
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        sums_CD = x_ND.new_zeros(num_cells, x_ND.shape[1], dtype=wide)
        masked = _masked(weights_NK, blocks_NA, num_blocks, block_size)
        for weights_nC, x_nD in zip(masked, x_ND.split(_tokens_at_once(num_cells)), strict=True):
            sums_CD += weights_nC.t() @ x_nD
        return sums_CD.to(x_ND.dtype).unflatten(0, (num_blocks, block_size))


def _tokens_at_once(num_cells: int) -> int:
    return max(1, MASKED_ELEMENTS // num_cells)


def _masked(
    weights_NK: Tensor, blocks_NA: Tensor, num_blocks: int, block_size: int
) -> Iterator[Tensor]:
    """Weights of all cells, zero where a token does not use them, some tokens at a time: (n, C)."""
    num_cells = num_blocks * block_size
    each = _tokens_at_once(num_cells)
    cells_NK = cells_of(blocks_NA, block_size)
    for weights_nK, cells_nK in zip(weights_NK.split(each), cells_NK.split(each), strict=True):
        masked = weights_nK.new_zeros(len(weights_nK) * num_cells)
        first_n1 = torch.arange(len(weights_nK), device=masked.device).unsqueeze(1) * num_cells
        # In one dimension PyTorch can add up reproducibly.
        masked.scatter_add_(0, (first_n1 + cells_nK).flatten(), weights_nK.flatten())
        yield masked.view(-1, num_cells)


BAGS: dict[str, BagKernels] = {
    "bags": TorchBags(),
    "native_bags": NativeBags(),
    "masked": MaskedBags(),
}

MASKED_ELEMENTS = 2**28
"""About how many numbers a product with the whole table has at a time."""

MASKED_SHARE = 64
"""A product with the whole table takes a GPU less time than gathering one row in so many, by
arithmetic for an H100: some 170 FLOPs a byte, less what gathers lose to a stream."""


def pays_to_mask(num_tokens: int, active_blocks: int, num_blocks: int) -> bool:
    """Whether products with the whole table are faster on an accelerator than gathered rows."""
    is_large_part = active_blocks * MASKED_SHARE >= num_blocks
    return is_large_part and num_tokens * active_blocks >= num_blocks


def choose_bags(
    device_type: str, dtype: torch.dtype, num_tokens: int, active_blocks: int, num_blocks: int
) -> BagKernels:
    """The fastest kernels for this device, dtype and these sizes."""
    if device_type != "cpu":
        masks = pays_to_mask(num_tokens, active_blocks, num_blocks)
        return BAGS["masked" if masks else "bags"]
    native = BAGS["native_bags"]
    return native if native.supports(device_type, dtype) else BAGS["bags"]


def cells_of(blocks_NA: Tensor, block_size: int) -> Tensor:
    """The cells of the given blocks, block by block: (N, A * G)."""
    if block_size == 1:
        return blocks_NA
    within_G = torch.arange(block_size, device=blocks_NA.device)
    return (blocks_NA.unsqueeze(2) * block_size + within_G).flatten(1)
