"""The two halves of the memory as embedding bags: each token sums or multiplies table rows.

Both are autograd functions. They gather no rows, and their forward passes sort nothing. The
gradient of a table is an embedding bag too: each table row sums the tokens that used it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .embedding_bag_kernels import EmbeddingBagKernels, RowOrder, cells_of


def sum_rows(
    weights_NK: Tensor,
    table_BGD: Tensor,
    blocks_NA: Tensor,
    order: RowOrder,
    kernels: EmbeddingBagKernels,
) -> Tensor:
    """Sum weight * row over the rows of each token's blocks: (N, D).

    Args:
        weights_NK: weights of the K = A * G rows.
        table_BGD: the table.
        blocks_NA: selected blocks.
        order: shared with :func:`dot_rows`, so that both backward passes sort once.
        kernels: the implementation.
    """
    if not torch.is_grad_enabled():  # saves a tenth of the time of decoding one token
        return kernels.sums(weights_NK, table_BGD, blocks_NA)
    return _SumRows.apply(weights_NK, table_BGD, blocks_NA, order, kernels)


def dot_rows(
    x_ND: Tensor,
    table_BGD: Tensor,
    bias_BG: Tensor | None,
    blocks_NA: Tensor,
    order: RowOrder,
    kernels: EmbeddingBagKernels,
    known_NK: Tensor | None = None,
) -> Tensor:
    """Compute x . row + bias for the rows of each token's blocks: (N, K).

    Args:
        x_ND: hidden states.
        table_BGD, bias_BG: the table, and the bias of its rows.
        blocks_NA: selected blocks.
        order: shared with :func:`sum_rows`, so that both backward passes sort once.
        kernels: the implementation.
        known_NK: the result, if the caller has it and only needs gradients. It must not be a
            view, and becomes the returned tensor.
    """
    shape = len(blocks_NA), blocks_NA.shape[1] * table_BGD.shape[1]
    if torch.is_grad_enabled():
        dots = _DotRows.apply(x_ND, table_BGD, bias_BG, blocks_NA, order, kernels, known_NK)
        return dots.view(shape)
    if known_NK is not None:
        return known_NK
    return kernels.dots(x_ND, table_BGD, bias_BG, blocks_NA).view(shape)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights_NK: Tensor,
        table_BGD: Tensor,
        blocks_NA: Tensor,
        order: RowOrder,
        kernels: EmbeddingBagKernels,
    ) -> Tensor:
        ctx.save_for_backward(weights_NK, table_BGD, blocks_NA)
        ctx.order, ctx.kernels = order, kernels
        return kernels.sums(weights_NK, table_BGD, blocks_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        weights_NK, table_BGD, blocks_NA = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_weights_NK = grad_table_BGD = None
        if ctx.needs_input_grad[0]:
            dots = ctx.kernels.dots(grad_ND, table_BGD, None, blocks_NA)
            grad_weights_NK = dots.view(weights_NK.shape)
        if ctx.needs_input_grad[1]:
            grad_table_BGD = ctx.kernels.table_sums(
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
        kernels: EmbeddingBagKernels,
        known_NK: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, table_BGD, blocks_NA)
        ctx.order, ctx.kernels = order, kernels
        if known_NK is not None:
            ctx.mark_dirty(known_NK)
            return known_NK
        # Flat: an in-place activation may not change a view made inside an autograd function.
        return kernels.dots(x_ND, table_BGD, bias_BG, blocks_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, table_BGD, blocks_NA = ctx.saved_tensors
        num_blocks, block_size = table_BGD.shape[:2]
        grad_NK = grad.contiguous().view(len(blocks_NA), blocks_NA.shape[1] * block_size)
        grad_x_ND = grad_table_BGD = grad_bias_BG = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = ctx.kernels.sums(grad_NK, table_BGD, blocks_NA)
        if ctx.needs_input_grad[1]:
            grad_table_BGD = ctx.kernels.table_sums(grad_NK, x_ND, blocks_NA, ctx.order, num_blocks)
        if ctx.needs_input_grad[2]:
            # In fp32 at least: half precision would lose small terms of a large sum.
            wide = torch.promote_types(grad.dtype, torch.float32)
            sums_C = grad.new_zeros(num_blocks * block_size, dtype=wide)
            cells_P = cells_of(blocks_NA, block_size).flatten()
            sums_C.scatter_add_(0, cells_P, grad_NK.flatten().to(wide))
            grad_bias_BG = sums_C.to(grad.dtype).view(num_blocks, block_size)
        return grad_x_ND, grad_table_BGD, grad_bias_BG, None, None, None, None
