"""The two halves of the memory as autograd functions over assignments sorted by block.

For the backward pass they save what a dense FFN saves: x and the hidden activations. They gather
the rows of the tokens a second time, one chunk after the other into the same buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chunks import ChunkedAssignments
from .grouped_mm import GroupedMM


def pre_activations(
    x_ND: Tensor,
    tables: Sequence[tuple[Tensor, Tensor | None]],
    assignments: ChunkedAssignments,
    mm: GroupedMM,
) -> tuple[Tensor, ...]:
    """Compute x . k + c for the cells of each sorted assignment: (P, G) for each table.

    Args:
        x_ND: hidden states.
        tables: keys (B, G, D) and biases (B, G) or ``None``. The rows of x are gathered once for
            all of them.
        assignments, mm: sorted assignments, and what multiplies them.
    """
    return _PreActivations.apply(x_ND, assignments, mm, *itertools.chain(*tables))


def sum_values(
    hidden_PG: Tensor,
    weights_P: Tensor | None,
    values_BGD: Tensor,
    assignments: ChunkedAssignments,
    num_tokens: int,
    mm: GroupedMM,
) -> Tensor:
    """Sum weight * hidden . values over the assignments of each token: (N, D)."""
    return _SumValues.apply(hidden_PG, weights_P, values_BGD, assignments, num_tokens, mm)


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        assignments: ChunkedAssignments,
        mm: GroupedMM,
        *tables: Tensor | None,
    ) -> tuple[Tensor, ...]:
        keys = [table for table in tables[::2] if table is not None]
        biases = tables[1::2]
        ctx.save_for_backward(x_ND, *keys)
        ctx.assignments, ctx.mm = assignments, mm
        pre = [x_ND.new_empty(len(assignments.tokens), each.shape[1]) for each in keys]
        buffer_pD = _buffer(x_ND, assignments)
        for chunk in assignments.chunks:
            rows_pD = _gather(x_ND, assignments.tokens[chunk.assignments], buffer_pD)
            for pre_PG, keys_BGD, bias_BG in zip(pre, keys, biases, strict=True):
                keys_BDG, pre_pG = keys_BGD.transpose(1, 2), pre_PG[chunk.assignments]
                mm.grouped_mm(rows_pD, keys_BDG, chunk, pre_pG, bias_BG)
        return tuple(pre)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *keys = ctx.saved_tensors
        assignments, mm, needed = ctx.assignments, ctx.mm, ctx.needs_input_grad
        grads = tuple(grad_PG.contiguous() for grad_PG in grads)
        grad_x_ND = _sums(x_ND, x_ND.shape) if needed[0] else None
        grad_keys = [
            _grad_table(each, assignments) if needs else None
            for each, needs in zip(keys, needed[3::2], strict=True)
        ]
        buffer_pD, product_pD = _buffer(x_ND, assignments), _buffer(x_ND, assignments)
        for chunk in assignments.chunks:
            tokens_p = assignments.tokens[chunk.assignments]
            grads_pG = [grad_PG[chunk.assignments] for grad_PG in grads]
            rows_pD = buffer_pD[: len(tokens_p)]
            if any(needed[3::2]):
                _gather(x_ND, tokens_p, buffer_pD)
            for grad_pG, grad_keys_BGD in zip(grads_pG, grad_keys, strict=True):
                if grad_keys_BGD is not None:
                    mm.grouped_mm_transposed(grad_pG, rows_pD, chunk, grad_keys_BGD)
            if grad_x_ND is None:
                continue
            for i, (grad_pG, keys_BGD) in enumerate(zip(grads_pG, keys, strict=True)):
                out_pD = product_pD[: len(tokens_p)] if i else rows_pD
                mm.grouped_mm(grad_pG, keys_BGD, chunk, out_pD)
                if i:
                    rows_pD += out_pD
            mm.add_rows(grad_x_ND, tokens_p, rows_pD.to(grad_x_ND.dtype))
        result = [None if grad_x_ND is None else grad_x_ND.to(x_ND.dtype), None, None]
        for grad_PG, keys_BGD, grad_keys_BGD, needs in zip(
            grads, keys, grad_keys, needed[4::2], strict=True
        ):
            result += [grad_keys_BGD, None]
            if needs:
                sums_BG = _sums(grad_PG, keys_BGD.shape[:2])
                sums_BG.index_add_(0, assignments.blocks, grad_PG.to(sums_BG.dtype))
                result[-1] = sums_BG.to(grad_PG.dtype)
        return tuple(result)


class _SumValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PG: Tensor,
        weights_P: Tensor | None,
        values_BGD: Tensor,
        assignments: ChunkedAssignments,
        num_tokens: int,
        mm: GroupedMM,
    ) -> Tensor:
        ctx.save_for_backward(hidden_PG, weights_P, values_BGD)
        ctx.assignments, ctx.mm = assignments, mm
        out_ND = _sums(hidden_PG, (num_tokens, values_BGD.shape[2]))
        buffer_pD = _buffer(values_BGD[0], assignments)
        for chunk in assignments.chunks:
            weighted_pG = _weight(hidden_PG[chunk.assignments], weights_P, chunk.assignments)
            rows_pD = buffer_pD[: len(weighted_pG)]
            mm.grouped_mm(weighted_pG, values_BGD, chunk, rows_pD)
            mm.add_rows(out_ND, assignments.tokens[chunk.assignments], rows_pD.to(out_ND.dtype))
        return out_ND.to(hidden_PG.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PG, weights_P, values_BGD = ctx.saved_tensors
        assignments, mm = ctx.assignments, ctx.mm
        grad_ND = grad_ND.contiguous()
        grad_hidden_PG = torch.empty_like(hidden_PG)
        grad_weights_P = None if weights_P is None else torch.empty_like(weights_P)
        grad_values_BGD = _grad_table(values_BGD, assignments) if ctx.needs_input_grad[2] else None
        buffer_pD = _buffer(grad_ND, assignments)
        for chunk in assignments.chunks:
            within = chunk.assignments
            hidden_pG, grad_pG = hidden_PG[within], grad_hidden_PG[within]
            rows_pD = _gather(grad_ND, assignments.tokens[within], buffer_pD)
            mm.grouped_mm(rows_pD, values_BGD.transpose(1, 2), chunk, grad_pG)
            if grad_values_BGD is not None:
                weighted_pG = _weight(hidden_pG, weights_P, within)
                mm.grouped_mm_transposed(weighted_pG, rows_pD, chunk, grad_values_BGD)
            if weights_P is not None:
                assert grad_weights_P is not None
                grad_weights_P[within] = (grad_pG * hidden_pG).sum(dim=1)
                grad_pG *= weights_P[within].unsqueeze(1)
        return grad_hidden_PG, grad_weights_P, grad_values_BGD, None, None, None


def _sums(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros to add to, in fp32 at least: half precision would lose small terms of a large sum."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return like.new_zeros(shape, dtype=wide)


def _buffer(like_ND: Tensor, assignments: ChunkedAssignments) -> Tensor:
    """Allocate the rows of the largest chunk."""
    slices = [chunk.assignments for chunk in assignments.chunks]
    largest = max((each.stop - each.start for each in slices), default=0)
    return like_ND.new_empty(largest, like_ND.shape[1])


def _gather(rows_ND: Tensor, tokens_p: Tensor, buffer_pD: Tensor) -> Tensor:
    out_pD = buffer_pD[: len(tokens_p)]
    return torch.index_select(rows_ND, 0, tokens_p, out=out_pD)


def _grad_table(table_BGD: Tensor, assignments: ChunkedAssignments) -> Tensor:
    """Allocate the gradient of a table, with zeros only where no chunk writes.

    Zeroing all of it would cost as much as a matrix product.
    """
    grad_BGD = torch.empty_like(table_BGD)
    end = 0
    for chunk in assignments.chunks:
        grad_BGD[end : chunk.blocks.start].zero_()
        end = chunk.blocks.stop
    grad_BGD[end:].zero_()
    return grad_BGD


def _weight(rows_pX: Tensor, weights_P: Tensor | None, within: slice) -> Tensor:
    return rows_pX if weights_P is None else rows_pX * weights_P[within].unsqueeze(1)
