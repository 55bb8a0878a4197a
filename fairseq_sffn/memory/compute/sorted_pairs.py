"""The two halves of the memory as autograd functions over sorted pairs.

They keep for backward what a dense FFN keeps, x and the hidden activations; gathered rows are
gathered again, a chunk at a time into the same buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import Plan
from .products import Products


def score(
    x_ND: Tensor, keys_BGD: Tensor, key_bias_BG: Tensor | None, plan: Plan, products: Products
) -> Tensor:
    """x . k + c for the cells of each sorted pair: (P, G)."""
    return _Score.apply(x_ND, keys_BGD, key_bias_BG, plan, products)


def combine(
    hidden_PG: Tensor,
    weights_P: Tensor | None,
    values_BGD: Tensor,
    plan: Plan,
    num_tokens: int,
    products: Products,
) -> Tensor:
    """Sum over each token's pairs of weight * hidden . values: (N, D)."""
    return _Combine.apply(hidden_PG, weights_P, values_BGD, plan, num_tokens, products)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        keys_BGD: Tensor,
        key_bias_BG: Tensor | None,
        plan: Plan,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, keys_BGD)
        ctx.plan, ctx.products = plan, products
        pre_PG = x_ND.new_empty(len(plan.tokens), keys_BGD.shape[1])
        buffer_pD = _buffer(x_ND, plan)
        for chunk in plan.chunks:
            rows_pD = _gather(x_ND, plan.tokens[chunk.pairs], buffer_pD)
            products.rows_by_matrices(
                rows_pD, keys_BGD.transpose(1, 2), chunk, pre_PG[chunk.pairs], key_bias_BG
            )
        return pre_PG

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_PG: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, keys_BGD = ctx.saved_tensors
        plan, products = ctx.plan, ctx.products
        grad_PG = grad_PG.contiguous()
        grad_x_ND = _sums(x_ND, x_ND.shape) if ctx.needs_input_grad[0] else None
        grad_keys_BGD = _grad_table(keys_BGD, plan) if ctx.needs_input_grad[1] else None
        buffer_pD = _buffer(x_ND, plan)
        for chunk in plan.chunks:
            tokens_p, grad_pG = plan.tokens[chunk.pairs], grad_PG[chunk.pairs]
            if grad_keys_BGD is not None:
                rows_pD = _gather(x_ND, tokens_p, buffer_pD)
                products.rows_by_rows(grad_pG, rows_pD, chunk, grad_keys_BGD)
            if grad_x_ND is not None:
                rows_pD = buffer_pD[: len(tokens_p)]
                products.rows_by_matrices(grad_pG, keys_BGD, chunk, rows_pD)
                products.add_rows(grad_x_ND, tokens_p, rows_pD.to(grad_x_ND.dtype))
        grad_bias_BG = None
        if ctx.needs_input_grad[2]:
            sums_BG = _sums(grad_PG, keys_BGD.shape[:2])
            sums_BG.index_add_(0, plan.blocks, grad_PG.to(sums_BG.dtype))
            grad_bias_BG = sums_BG.to(grad_PG.dtype)
        if grad_x_ND is not None:
            grad_x_ND = grad_x_ND.to(x_ND.dtype)
        return grad_x_ND, grad_keys_BGD, grad_bias_BG, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PG: Tensor,
        weights_P: Tensor | None,
        values_BGD: Tensor,
        plan: Plan,
        num_tokens: int,
        products: Products,
    ) -> Tensor:
        ctx.save_for_backward(hidden_PG, weights_P, values_BGD)
        ctx.plan, ctx.products = plan, products
        out_ND = _sums(hidden_PG, (num_tokens, values_BGD.shape[2]))
        buffer_pD = _buffer(values_BGD[0], plan)
        for chunk in plan.chunks:
            weighed_pG = _weigh(hidden_PG[chunk.pairs], weights_P, chunk.pairs)
            rows_pD = buffer_pD[: len(weighed_pG)]
            products.rows_by_matrices(weighed_pG, values_BGD, chunk, rows_pD)
            products.add_rows(out_ND, plan.tokens[chunk.pairs], rows_pD.to(out_ND.dtype))
        return out_ND.to(hidden_PG.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PG, weights_P, values_BGD = ctx.saved_tensors
        plan, products = ctx.plan, ctx.products
        grad_ND = grad_ND.contiguous()
        grad_hidden_PG = torch.empty_like(hidden_PG)
        grad_weights_P = None if weights_P is None else torch.empty_like(weights_P)
        grad_values_BGD = _grad_table(values_BGD, plan) if ctx.needs_input_grad[2] else None
        buffer_pD = _buffer(grad_ND, plan)
        for chunk in plan.chunks:
            hidden_pG, grad_pG = hidden_PG[chunk.pairs], grad_hidden_PG[chunk.pairs]
            rows_pD = _gather(grad_ND, plan.tokens[chunk.pairs], buffer_pD)
            products.rows_by_matrices(rows_pD, values_BGD.transpose(1, 2), chunk, grad_pG)
            if grad_values_BGD is not None:
                weighed_pG = _weigh(hidden_pG, weights_P, chunk.pairs)
                products.rows_by_rows(weighed_pG, rows_pD, chunk, grad_values_BGD)
            if weights_P is not None:
                assert grad_weights_P is not None
                grad_weights_P[chunk.pairs] = (grad_pG * hidden_pG).sum(dim=1)
                grad_pG *= weights_P[chunk.pairs].unsqueeze(1)
        return grad_hidden_PG, grad_weights_P, grad_values_BGD, None, None, None


def _sums(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Room for sums, in fp32 at least: half precision would lose what is added to a large one."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return like.new_zeros(shape, dtype=wide)


def _buffer(like_ND: Tensor, plan: Plan) -> Tensor:
    """Room for the rows of any chunk."""
    largest = max((chunk.pairs.stop - chunk.pairs.start for chunk in plan.chunks), default=0)
    return like_ND.new_empty(largest, like_ND.shape[1])


def _gather(rows_ND: Tensor, tokens_p: Tensor, buffer_pD: Tensor) -> Tensor:
    out_pD = buffer_pD[: len(tokens_p)]
    return torch.index_select(rows_ND, 0, tokens_p, out=out_pD)


def _grad_table(table_BGD: Tensor, plan: Plan) -> Tensor:
    """Room for the gradient of a table, zeroed where no chunk writes: to write zeros first to
    what is written anyway would cost as much as a product."""
    grad_BGD = torch.empty_like(table_BGD)
    end = 0
    for chunk in plan.chunks:
        grad_BGD[end : chunk.blocks.start].zero_()
        end = chunk.blocks.stop
    grad_BGD[end:].zero_()
    return grad_BGD


def _weigh(rows_pX: Tensor, weights_P: Tensor | None, pairs: slice) -> Tensor:
    return rows_pX if weights_P is None else rows_pX * weights_P[pairs].unsqueeze(1)
