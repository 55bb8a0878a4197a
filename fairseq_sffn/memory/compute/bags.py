"""The two halves of the memory as bags of table rows, one for each token.

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


class RowOrder:
    """Pairs in the order of the rows that they use; the gradients of keys and values share it.

    Args:
        num_rows: C, of the table.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._order: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, index_NA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions in the flattened index, by row (P,), the token of each (P,), and where each
        row starts (C,)."""
        if self._order is None:
            sorted_P, order_P = sort_blocks(index_NA.flatten(), self.num_rows)
            rows_C = torch.arange(self.num_rows, device=sorted_P.device, dtype=sorted_P.dtype)
            tokens_P = order_P.div(max(index_NA.shape[1], 1), rounding_mode="floor")
            self._order = order_P, tokens_P, torch.searchsorted(sorted_P, rows_C)
        return self._order


class Rows:
    """Which rows of a table each token uses.

    Args:
        index_NA: the row numbers.
        num_rows: C, of the table.
    """

    def __init__(self, index_NA: Tensor, num_rows: int) -> None:
        self.index, self.order = index_NA, RowOrder(num_rows)


def cells_of(blocks_NA: Tensor, block_size: int) -> Tensor:
    """The cells of the given blocks, block by block: (N, A * G)."""
    if block_size == 1:
        return blocks_NA
    within_G = torch.arange(block_size, device=blocks_NA.device)
    return (blocks_NA.unsqueeze(2) * block_size + within_G).flatten(1)


def sum_rows(weights_NA: Tensor, table_CD: Tensor, rows: Rows) -> Tensor:
    """Sum over a of weights[n, a] * table[index[n, a]]: (N, D)."""
    if not torch.is_grad_enabled():  # a tenth of the time of a layer that decodes one token
        return _sums(weights_NA, table_CD, rows.index)
    return _SumRows.apply(weights_NA, table_CD, rows.index, rows.order)


def dot_rows(
    x_ND: Tensor,
    table_CD: Tensor,
    bias_C: Tensor | None,
    rows: Rows,
    known_NA: Tensor | None = None,
) -> Tensor:
    """x[n] . table[index[n, a]] + bias[index[n, a]]: (N, A).

    Args:
        known_NA: the result, where it is known already and only gradients are to flow. It is used
            up, and no view.
    """
    if not torch.is_grad_enabled():
        return _dots(x_ND, table_CD, bias_C, rows.index) if known_NA is None else known_NA
    dots = _DotRows.apply(x_ND, table_CD, bias_C, rows.index, rows.order, known_NA)
    return dots.view(rows.index.shape)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights_NA: Tensor, table_CD: Tensor, index_NA: Tensor, order: RowOrder
    ) -> Tensor:
        ctx.save_for_backward(weights_NA, table_CD, index_NA)
        ctx.order = order
        return _sums(weights_NA, table_CD, index_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        weights_NA, table_CD, index_NA = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_weights_NA = grad_table_CD = None
        if ctx.needs_input_grad[0]:
            grad_weights_NA = _dots(grad_ND, table_CD, None, index_NA)
        if ctx.needs_input_grad[1]:
            grad_table_CD = _sums_by_row(weights_NA, grad_ND, ctx.order.of(index_NA))
        return grad_weights_NA, grad_table_CD, None, None


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        table_CD: Tensor,
        bias_C: Tensor | None,
        index_NA: Tensor,
        order: RowOrder,
        known_NA: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, table_CD, index_NA)
        ctx.order = order
        if known_NA is not None:
            ctx.mark_dirty(known_NA)
            return known_NA
        # Flat: an activation may work in place, and may not on a view that is made here.
        return _flat_dots(x_ND, table_CD, bias_C, index_NA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, table_CD, index_NA = ctx.saved_tensors
        grad_NA = grad.contiguous().view(index_NA.shape)
        grad_x_ND = grad_table_CD = grad_bias_C = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = _sums(grad_NA, table_CD, index_NA)
        if ctx.needs_input_grad[1]:
            grad_table_CD = _sums_by_row(grad_NA, x_ND, ctx.order.of(index_NA))
        if ctx.needs_input_grad[2]:
            # In fp32 at least: half precision would lose what is added to a large sum.
            wide = torch.promote_types(grad.dtype, torch.float32)
            sums_C = grad.new_zeros(len(table_CD), dtype=wide)
            sums_C.scatter_add_(0, index_NA.flatten(), grad_NA.flatten().to(wide))
            grad_bias_C = sums_C.to(grad.dtype)
        return grad_x_ND, grad_table_CD, grad_bias_C, None, None, None


def _sums(weights_NA: Tensor, table_CD: Tensor, index_NA: Tensor) -> Tensor:
    return F.embedding_bag(index_NA, table_CD, per_sample_weights=weights_NA, mode="sum")


def _dots(x_ND: Tensor, table_CD: Tensor, bias_C: Tensor | None, index_NA: Tensor) -> Tensor:
    return _flat_dots(x_ND, table_CD, bias_C, index_NA).view(index_NA.shape)


def _flat_dots(x_ND: Tensor, table_CD: Tensor, bias_C: Tensor | None, index_NA: Tensor) -> Tensor:
    # They are the gradients of the weights of a bag. PyTorch's kernel for them has no public name,
    # and to ask autograd for it costs the bag as well and fails in inference mode.
    num_tokens, active = index_NA.shape
    tokens_N = torch.arange(num_tokens, device=x_ND.device)
    index_P = index_NA.flatten()
    dots_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_ND.contiguous(),
        table_CD.contiguous(),
        index_P,
        tokens_N * active,
        tokens_N.repeat_interleave(active, output_size=num_tokens * active),
        _SUM,
    )
    if bias_C is not None:
        dots_P += bias_C.index_select(0, index_P)
    return dots_P


def _sums_by_row(weights_NA: Tensor, x_ND: Tensor, order: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """For each table row, the sum over the pairs that index it of weight * x[n]: (C, D)."""
    order_P, tokens_P, starts_C = order
    weights_P = weights_NA.flatten()[order_P]
    return F.embedding_bag(tokens_P, x_ND, starts_C, per_sample_weights=weights_P, mode="sum")
