"""The two halves of the memory as bags of table rows, one for each token.

Both are autograd functions over ``embedding_bag``, which neither gathers rows nor sorts. The
gradient of a table is a bag as well: of the tokens that used each row. (PyTorch's own gradient of
``embedding_bag`` adds one pair at a time, several times slower on a CPU.)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import sort_blocks

_SUM = 0
"""The kernels' number of ``mode="sum"``."""


class Rows:
    """Which rows of a table each token uses, and in turn which tokens use each row.

    Args:
        index_NA: the row numbers.
        num_rows: C, of the table.
    """

    def __init__(self, index_NA: Tensor, num_rows: int) -> None:
        self.index, self.num_rows = index_NA, num_rows

    @functools.cached_property
    def offsets(self) -> Tensor:
        """Where each token starts in the flattened index: (N,)."""
        num_tokens, active = self.index.shape
        return torch.arange(num_tokens, device=self.index.device) * active

    @functools.cached_property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions in the flattened index, by row (P,), the token of each (P,), and where each
        row starts (C,). The gradients of keys and values share them."""
        sorted_P, order_P = sort_blocks(self.index.flatten(), self.num_rows)
        rows_C = torch.arange(self.num_rows, device=sorted_P.device, dtype=sorted_P.dtype)
        tokens_P = order_P.div(max(self.index.shape[1], 1), rounding_mode="floor")
        return order_P, tokens_P, torch.searchsorted(sorted_P, rows_C)


def cells_of(blocks_NA: Tensor, block_size: int) -> Tensor:
    """The cells of the given blocks, block by block: (N, A * G)."""
    if block_size == 1:
        return blocks_NA
    within_G = torch.arange(block_size, device=blocks_NA.device)
    return (blocks_NA.unsqueeze(2) * block_size + within_G).flatten(1)


def sum_rows(weights_NA: Tensor, table_CD: Tensor, rows: Rows) -> Tensor:
    """Sum over a of weights[n, a] * table[index[n, a]]: (N, D)."""
    if not torch.is_grad_enabled():  # a tenth of the time of a layer that decodes one token
        return _sums(weights_NA, table_CD, rows)
    return _SumRows.apply(weights_NA, table_CD, rows)


def dot_rows(
    x_ND: Tensor,
    table_CD: Tensor,
    bias_C: Tensor | None,
    rows: Rows,
    known_NA: Tensor | None = None,
) -> Tensor:
    """x[n] . table[index[n, a]] + bias[index[n, a]]: (N, A).

    Args:
        known_NA: the result, where it is known already and only gradients are to flow.
    """
    if not torch.is_grad_enabled():
        return _dots(x_ND, table_CD, bias_C, rows) if known_NA is None else known_NA
    return _DotRows.apply(x_ND, table_CD, bias_C, rows, known_NA)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_NA: Tensor, table_CD: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(weights_NA, table_CD)
        ctx.rows = rows
        return _sums(weights_NA, table_CD, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        weights_NA, table_CD = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_weights_NA = grad_table_CD = None
        if ctx.needs_input_grad[0]:
            grad_weights_NA = _dots(grad_ND, table_CD, None, ctx.rows)
        if ctx.needs_input_grad[1]:
            grad_table_CD = _sums_by_row(weights_NA, grad_ND, ctx.rows)
        return grad_weights_NA, grad_table_CD, None


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        table_CD: Tensor,
        bias_C: Tensor | None,
        rows: Rows,
        known_NA: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, table_CD)
        ctx.rows = rows
        if known_NA is not None:
            return known_NA.view_as(known_NA)
        return _dots(x_ND, table_CD, bias_C, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NA: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, table_CD = ctx.saved_tensors
        grad_NA = grad_NA.contiguous()
        grad_x_ND = grad_table_CD = grad_bias_C = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = _sums(grad_NA, table_CD, ctx.rows)
        if ctx.needs_input_grad[1]:
            grad_table_CD = _sums_by_row(grad_NA, x_ND, ctx.rows)
        if ctx.needs_input_grad[2]:
            grad_bias_C = grad_NA.new_zeros(len(table_CD))
            grad_bias_C.scatter_add_(0, ctx.rows.index.flatten(), grad_NA.flatten())
        return grad_x_ND, grad_table_CD, grad_bias_C, None, None


def _sums(weights_NA: Tensor, table_CD: Tensor, rows: Rows) -> Tensor:
    return F.embedding_bag(
        rows.index.flatten(),
        table_CD,
        rows.offsets,
        per_sample_weights=weights_NA.flatten(),
        mode="sum",
    )


def _dots(x_ND: Tensor, table_CD: Tensor, bias_C: Tensor | None, rows: Rows) -> Tensor:
    # They are the gradients of the weights of a bag. PyTorch's kernel for them has no public name,
    # and to ask autograd for it costs the bag as well and fails in inference mode.
    num_tokens, active = rows.index.shape
    tokens_N = torch.arange(num_tokens, device=x_ND.device)
    dots_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_ND.contiguous(),
        table_CD.contiguous(),
        rows.index.flatten(),
        rows.offsets,
        tokens_N.repeat_interleave(active, output_size=num_tokens * active),
        _SUM,
    )
    if bias_C is not None:
        dots_P += bias_C.index_select(0, rows.index.flatten())
    return dots_P.view(num_tokens, active)


def _sums_by_row(weights_NA: Tensor, x_ND: Tensor, rows: Rows) -> Tensor:
    """For each table row, the sum over the pairs that index it of weight * x[n]: (C, D)."""
    order_P, tokens_P, starts_C = rows.by_row
    weights_P = weights_NA.flatten()[order_P]
    return F.embedding_bag(tokens_P, x_ND, starts_C, per_sample_weights=weights_P, mode="sum")
