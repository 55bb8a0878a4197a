"""The two halves of the memory as bags of table rows, one for each token.

Both are autograd functions that neither gather rows nor, in the forward pass, sort. The gradient
of a table is a bag as well: of the tokens that used each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bag_kernels import BagKernels, RowOrder, cells_of


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
            cells_P = cells_of(blocks_NA, block_size).flatten()
            sums_C.scatter_add_(0, cells_P, grad_NK.flatten().to(wide))
            grad_bias_BG = sums_C.to(grad.dtype).view(num_blocks, block_size)
        return grad_x_ND, grad_table_BGD, grad_bias_BG, None, None, None, None
