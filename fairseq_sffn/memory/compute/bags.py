"""The two halves of the memory as bags of table rows, one for each token.

Both are autograd functions that neither gather rows nor, in the forward pass, sort. The gradient
of a table is a bag as well: of the tokens that used each row.
"""

from __future__ import annotations

from typing import Any, Protocol

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

    def supports(self, dtype: torch.dtype) -> bool:
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

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def dots(
        self, x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, blocks_NA: Tensor
    ) -> Tensor:
        # They are the gradients of the weights of a bag. PyTorch's kernel for them has no public
        # name, and to ask autograd for it costs the bag as well and fails in inference mode.
        cells_NK = _cells_of(blocks_NA, table_BGD.shape[1])
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
        cells_NK = _cells_of(blocks_NA, table_BGD.shape[1])
        table_CD = table_BGD.flatten(0, 1)
        return F.embedding_bag(cells_NK, table_CD, per_sample_weights=weights_NK, mode="sum")

    def table_sums(
        self, weights_NK: Tensor, x_ND: Tensor, blocks_NA: Tensor, order: RowOrder, num_blocks: int
    ) -> Tensor:
        block_size = weights_NK.shape[1] // blocks_NA.shape[1]
        cells_NK = _cells_of(blocks_NA, block_size)
        order_P, tokens_P, starts_C = order.of(cells_NK, num_blocks * block_size)
        weights_P = weights_NK.flatten()[order_P]
        sums_CD = F.embedding_bag(
            tokens_P, x_ND, starts_C, per_sample_weights=weights_P, mode="sum"
        )
        return sums_CD.unflatten(0, (num_blocks, block_size))


class NativeBags:
    """By the kernels of :mod:`.kernels`, which pass by rows without weight, such as those that
    relu has silenced."""

    def supports(self, dtype: torch.dtype) -> bool:
        return kernels.supported(dtype)

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


BAGS: dict[str, BagKernels] = {"bags": TorchBags(), "native_bags": NativeBags()}


def choose_bags(device_type: str, dtype: torch.dtype) -> BagKernels:
    """The fastest kernels for this device and dtype."""
    native = BAGS["native_bags"]
    return native if device_type == "cpu" and native.supports(dtype) else BAGS["bags"]


def sum_rows(
    weights_NK: Tensor, table_BGD: Tensor, blocks_NA: Tensor, order: RowOrder, bags: BagKernels
) -> Tensor:
    """Sum over the rows of each token's blocks of weight * row: (N, D)."""
    if not torch.is_grad_enabled():  # a tenth of the time of a layer that decodes one token
        return bags.sums(weights_NK, table_BGD, blocks_NA)
    return _SumRows.apply(weights_NK, table_BGD, blocks_NA, order, bags)


def dot_rows(
    x_ND: Tensor,
    table_BGD: Tensor,
    bias_BG: Tensor | None,
    blocks_NA: Tensor,
    order: RowOrder,
    bags: BagKernels,
    known_NK: Tensor | None = None,
) -> Tensor:
    """x . row + bias for the rows of each token's blocks: (N, K).

    Args:
        known_NK: the result, where it is known already and only gradients are to flow. It is used
            up, and no view.
    """
    shape = len(blocks_NA), blocks_NA.shape[1] * table_BGD.shape[1]
    if torch.is_grad_enabled():
        dots = _DotRows.apply(x_ND, table_BGD, bias_BG, blocks_NA, order, bags, known_NK)
        return dots.view(shape)
    if known_NK is not None:
        return known_NK
    return bags.dots(x_ND, table_BGD, bias_BG, blocks_NA).view(shape)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights_NK: Tensor,
        table_BGD: Tensor,
        blocks_NA: Tensor,
        order: RowOrder,
        bags: BagKernels,
    ) -> Tensor:
        ctx.save_for_backward(weights_NK, table_BGD, blocks_NA)
        ctx.order, ctx.bags = order, bags
        return bags.sums(weights_NK, table_BGD, blocks_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        weights_NK, table_BGD, blocks_NA = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_weights_NK = grad_table_BGD = None
        if ctx.needs_input_grad[0]:
            dots = ctx.bags.dots(grad_ND, table_BGD, None, blocks_NA)
            grad_weights_NK = dots.view(weights_NK.shape)
        if ctx.needs_input_grad[1]:
            grad_table_BGD = ctx.bags.table_sums(
                weights_NK, grad_ND, blocks_NA, ctx.order, len(table_BGD)
            )
        return grad_weights_NK, grad_table_BGD, None, None, None


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        table_BGD: Tensor,
        bias_BG: Tensor | None,
        blocks_NA: Tensor,
        order: RowOrder,
        bags: BagKernels,
        known_NK: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, table_BGD, blocks_NA)
        ctx.order, ctx.bags = order, bags
        if known_NK is not None:
            ctx.mark_dirty(known_NK)
            return known_NK
        # Flat: an activation may work in place, and may not on a view that is made here.
        return bags.dots(x_ND, table_BGD, bias_BG, blocks_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, table_BGD, blocks_NA = ctx.saved_tensors
        num_blocks, block_size = table_BGD.shape[:2]
        grad_NK = grad.contiguous().view(len(blocks_NA), blocks_NA.shape[1] * block_size)
        grad_x_ND = grad_table_BGD = grad_bias_BG = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = ctx.bags.sums(grad_NK, table_BGD, blocks_NA)
        if ctx.needs_input_grad[1]:
            grad_table_BGD = ctx.bags.table_sums(grad_NK, x_ND, blocks_NA, ctx.order, num_blocks)
        if ctx.needs_input_grad[2]:
            # In fp32 at least: half precision would lose what is added to a large sum.
            wide = torch.promote_types(grad.dtype, torch.float32)
            sums_C = grad.new_zeros(num_blocks * block_size, dtype=wide)
            cells_P = _cells_of(blocks_NA, block_size).flatten()
            sums_C.scatter_add_(0, cells_P, grad_NK.flatten().to(wide))
            grad_bias_BG = sums_C.to(grad.dtype).view(num_blocks, block_size)
        return grad_x_ND, grad_table_BGD, grad_bias_BG, None, None, None, None


def _cells_of(blocks_NA: Tensor, block_size: int) -> Tensor:
    """The cells of the given blocks, block by block: (N, A * G)."""
    if block_size == 1:
        return blocks_NA
    within_G = torch.arange(block_size, device=blocks_NA.device)
    return (blocks_NA.unsqueeze(2) * block_size + within_G).flatten(1)
