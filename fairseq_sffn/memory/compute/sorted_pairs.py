"""The two halves of the memory as autograd functions over sorted pairs.

They keep for backward what a dense FFN keeps, x and the hidden activations; gathered rows are
gathered again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .plan import Plan
from .products import Products


def score(
    x_ND: Tensor, keys_BGD: Tensor, key_bias_BG: Tensor | None, plan: Plan, products: Products
) -> Tensor:
    """x . k + c for the cells of each sorted pair: (P, G)."""
    pre_PG = _Score.apply(x_ND, keys_BGD, plan, products)
    return pre_PG if key_bias_BG is None else pre_PG + key_bias_BG[plan.blocks]


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
    def forward(ctx: Any, x_ND: Tensor, keys_BGD: Tensor, plan: Plan, products: Products) -> Tensor:
        ctx.save_for_backward(x_ND, keys_BGD)
        ctx.plan, ctx.products = plan, products
        pre_PG = x_ND.new_empty(len(plan.order), keys_BGD.shape[1])
        for chunk in plan.chunks:
            pre_PG[chunk.pairs] = products.rows_by_matrices(
                x_ND[plan.tokens[chunk.pairs]],
                keys_BGD[chunk.blocks].transpose(1, 2),
                chunk.ends,
            )
        return pre_PG

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_PG: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, keys_BGD = ctx.saved_tensors
        plan, products = ctx.plan, ctx.products
        grad_PG = grad_PG.contiguous()
        grad_x_ND = torch.zeros_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_keys_BGD = torch.zeros_like(keys_BGD) if ctx.needs_input_grad[1] else None
        for chunk in plan.chunks:
            tokens_p, grad_pG = plan.tokens[chunk.pairs], grad_PG[chunk.pairs]
            if grad_x_ND is not None:
                rows_pD = products.rows_by_matrices(grad_pG, keys_BGD[chunk.blocks], chunk.ends)
                grad_x_ND.index_add_(0, tokens_p, rows_pD)
            if grad_keys_BGD is not None:
                grad_keys_BGD[chunk.blocks] += products.rows_by_rows(
                    grad_pG, x_ND[tokens_p], chunk.ends
                )
        return grad_x_ND, grad_keys_BGD, None, None


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
        out_ND = hidden_PG.new_zeros(num_tokens, values_BGD.shape[2])
        for chunk in plan.chunks:
            rows_pD = products.rows_by_matrices(
                _weigh(hidden_PG[chunk.pairs], weights_P, chunk.pairs),
                values_BGD[chunk.blocks],
                chunk.ends,
            )
            out_ND.index_add_(0, plan.tokens[chunk.pairs], rows_pD)
        return out_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PG, weights_P, values_BGD = ctx.saved_tensors
        plan, products = ctx.plan, ctx.products
        grad_hidden_PG = torch.empty_like(hidden_PG)
        grad_weights_P = None if weights_P is None else torch.empty_like(weights_P)
        grad_values_BGD = torch.zeros_like(values_BGD) if ctx.needs_input_grad[2] else None
        for chunk in plan.chunks:
            hidden_pG, grad_pD = hidden_PG[chunk.pairs], grad_ND[plan.tokens[chunk.pairs]]
            grad_pG = products.rows_by_matrices(
                grad_pD, values_BGD[chunk.blocks].transpose(1, 2), chunk.ends
            )
            if grad_weights_P is not None:
                grad_weights_P[chunk.pairs] = (grad_pG * hidden_pG).sum(dim=1)
            grad_hidden_PG[chunk.pairs] = _weigh(grad_pG, weights_P, chunk.pairs)
            if grad_values_BGD is not None:
                grad_values_BGD[chunk.blocks] += products.rows_by_rows(
                    _weigh(hidden_pG, weights_P, chunk.pairs), grad_pD, chunk.ends
                )
        return grad_hidden_PG, grad_weights_P, grad_values_BGD, None, None, None


def _weigh(rows_pX: Tensor, weights_P: Tensor | None, pairs: slice) -> Tensor:
    return rows_pX if weights_P is None else rows_pX * weights_P[pairs].unsqueeze(1)
