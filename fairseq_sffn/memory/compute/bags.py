"""The two halves of the memory for blocks of one cell, as bags of table rows.

Both are autograd functions over ``embedding_bag``, which neither gathers rows nor sorts. The
gradient of a table is a bag as well: of the tokens that used each row. (PyTorch's own gradient of
``embedding_bag`` adds one pair at a time, several times slower on a CPU.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import sort_blocks

_SUM = 0
"""The kernels' number of ``mode="sum"``."""


def sum_rows(weights_NA: Tensor, table_CD: Tensor, index_NA: Tensor) -> Tensor:
    """Sum over a of weights[n, a] * table[index[n, a]]: (N, D)."""
    return _SumRows.apply(weights_NA, table_CD, index_NA)


def dot_rows(x_ND: Tensor, table_CD: Tensor, index_NA: Tensor) -> Tensor:
    """x[n] . table[index[n, a]]: (N, A)."""
    return _DotRows.apply(x_ND, table_CD, index_NA)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_NA: Tensor, table_CD: Tensor, index_NA: Tensor) -> Tensor:
        ctx.save_for_backward(weights_NA, table_CD, index_NA)
        return _sums(weights_NA, table_CD, index_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        weights_NA, table_CD, index_NA = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_weights_NA = grad_table_CD = None
        if ctx.needs_input_grad[0]:
            grad_weights_NA = _dots(grad_ND, table_CD, index_NA)
        if ctx.needs_input_grad[1]:
            grad_table_CD = _sums_by_row(weights_NA, grad_ND, index_NA, len(table_CD))
        return grad_weights_NA, grad_table_CD, None


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, table_CD: Tensor, index_NA: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, table_CD, index_NA)
        return _dots(x_ND, table_CD, index_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NA: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, table_CD, index_NA = ctx.saved_tensors
        grad_NA = grad_NA.contiguous()
        grad_x_ND = grad_table_CD = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = _sums(grad_NA, table_CD, index_NA)
        if ctx.needs_input_grad[1]:
            grad_table_CD = _sums_by_row(grad_NA, x_ND, index_NA, len(table_CD))
        return grad_x_ND, grad_table_CD, None


def _sums(weights_NA: Tensor, table_CD: Tensor, index_NA: Tensor) -> Tensor:
    return F.embedding_bag(index_NA, table_CD, per_sample_weights=weights_NA, mode="sum")


def _dots(x_ND: Tensor, table_CD: Tensor, index_NA: Tensor) -> Tensor:
    # They are the gradients of the weights of a bag. PyTorch's kernel for them has no public name,
    # and to ask autograd for it costs the bag as well and fails in inference mode.
    num_tokens, active = index_NA.shape
    tokens = torch.arange(num_tokens, device=index_NA.device)
    dots_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_ND.contiguous(),
        table_CD.contiguous(),
        index_NA.flatten(),
        tokens * active,
        tokens.repeat_interleave(active),
        _SUM,
    )
    return dots_P.view(num_tokens, active)


def _sums_by_row(weights_NA: Tensor, x_ND: Tensor, index_NA: Tensor, num_rows: int) -> Tensor:
    """For each table row, the sum over the pairs that index it of weight * x[n]: (C, D)."""
    sorted_P, order_P = sort_blocks(index_NA.flatten(), num_rows)
    rows = torch.arange(num_rows, device=sorted_P.device, dtype=sorted_P.dtype)
    return F.embedding_bag(
        order_P.div(max(index_NA.shape[1], 1), rounding_mode="floor"),
        x_ND,
        torch.searchsorted(sorted_P, rows),
        per_sample_weights=weights_NA.flatten()[order_P],
        mode="sum",
    )
