"""Products of rows with the tables of their blocks, tile by tile, as PyTorch operators.

There are three operators. The gradients of each are computed by the other two:

- ``gathered_products``: the row of each assignment's token times the table of its block;
- ``scattered_products``: a row of each assignment times the table of its block, summed by token;
- ``table_products``: the sum over each block's assignments of the outer product of the
  assignment's row and its token's row.

They support fake tensors and FLOP counters, and hence ``torch.compile`` and export. On CUDA devices
:mod:`.tiled_triton` computes them if Triton is installed; elsewhere :mod:`.tiled_torch` does. Sums
are in fp32 at least.

All take tables (B, G, D) and the fields of :class:`.tiles.Tiles`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import kernels, tiled_torch
from .tiles import Tiles

NAMESPACE = "fairseq_sffn"
"""Namespace of the operators in ``torch.ops``."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
"""Minimum compute capability: its matrix units have all dtypes of the kernels."""


def gathered_products(
    x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, tiles: Tiles
) -> Tensor:
    """Compute x . row + bias for the cells of each sorted assignment: (P, G).

    Dropped assignments have zeros.

    Args:
        x_ND: rows of the tokens.
        table_BGD, bias_BG: the table, and the bias of its rows.
        tiles: the sorted assignments.
    """
    return _gathered_products(x_ND, table_BGD, bias_BG, *tiles)


def scattered_products(rows_PG: Tensor, table_BGD: Tensor, num_tokens: int, tiles: Tiles) -> Tensor:
    """Sum row @ table of the block over the assignments of each token: (N, D).

    Dropped assignments are left out.

    Args:
        rows_PG: a row of each sorted assignment.
        table_BGD: the table.
        num_tokens: N.
        tiles: the sorted assignments.
    """
    return _scattered_products(rows_PG, table_BGD, num_tokens, *tiles)


def implementation(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the module that computes on this device in this dtype."""
    if (
        device.type != "cuda"
        or dtype not in TRITON_DTYPES
        or not _has_triton()
        or torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY
    ):
        return tiled_torch
    from . import tiled_triton

    return tiled_triton


@contextmanager
def _computing_on(rows: Tensor) -> Iterator[ModuleType]:
    """Yield the module that computes with these rows, on their device and in their dtype.

    Their device need not be the current one; autocast is disabled.
    """
    with torch.cuda.device_of(rows), torch.autocast(rows.device.type, enabled=False):
        yield implementation(rows.device, rows.dtype)


@functools.cache
def _has_triton() -> bool:
    return kernels.wanted() and importlib.util.find_spec("triton") is not None


@torch.library.custom_op(f"{NAMESPACE}::gathered_products", mutates_args=())
def _gathered_products(
    x_ND: Tensor,
    table_BGD: Tensor,
    bias_BG: Tensor | None,
    order_P: Tensor,
    starts_S: Tensor,
    tiles_2T: Tensor,
    active: int,
    rows: int,
) -> Tensor:
    tiles = Tiles(order_P, starts_S, tiles_2T, active, rows)
    bias_BG = None if bias_BG is None else bias_BG.contiguous()
    with _computing_on(x_ND) as module:
        return module.gathered_products(x_ND.contiguous(), table_BGD.contiguous(), bias_BG, tiles)


@torch.library.custom_op(f"{NAMESPACE}::scattered_products", mutates_args=())
def _scattered_products(
    rows_PG: Tensor,
    table_BGD: Tensor,
    num_tokens: int,
    order_P: Tensor,
    starts_S: Tensor,
    tiles_2T: Tensor,
    active: int,
    rows: int,
) -> Tensor:
    tiles = Tiles(order_P, starts_S, tiles_2T, active, rows)
    with _computing_on(rows_PG) as module:
        return module.scattered_products(
            rows_PG.contiguous(), table_BGD.contiguous(), num_tokens, tiles
        )


@torch.library.custom_op(f"{NAMESPACE}::table_products", mutates_args=())
def _table_products(
    rows_PG: Tensor,
    x_ND: Tensor,
    order_P: Tensor,
    starts_S: Tensor,
    tiles_2T: Tensor,
    active: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Sum row^T @ x (B, G, D) and the rows (B, G) over the assignments of each block."""
    tiles = Tiles(order_P, starts_S, tiles_2T, active, rows)
    with _computing_on(x_ND) as module:
        return module.table_products(rows_PG.contiguous(), x_ND.contiguous(), tiles)


@_gathered_products.register_fake
def _(x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, order_P: Tensor, *_: Any) -> Tensor:
    return x_ND.new_empty(len(order_P), table_BGD.shape[1])


@_scattered_products.register_fake
def _(rows_PG: Tensor, table_BGD: Tensor, num_tokens: int, *_: Any) -> Tensor:
    return rows_PG.new_empty(num_tokens, table_BGD.shape[2])


@_table_products.register_fake
def _(
    rows_PG: Tensor, x_ND: Tensor, order_P: Tensor, starts_S: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    num_blocks, block_size = len(starts_S) - 2, rows_PG.shape[1]
    return (
        x_ND.new_empty(num_blocks, block_size, x_ND.shape[1]),
        x_ND.new_empty(num_blocks, block_size),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save what the backward pass needs: the two factors and the fields of the tiles."""
    *tensors, active, rows = inputs[-5:]
    ctx.save_for_backward(*inputs[:2], *tensors)
    ctx.numbers = active, rows


def _gathered_backward(ctx: Any, grad_PG: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, table_BGD, *tensors = ctx.saved_tensors
    grad_x = grad_table = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _scattered_products(grad_PG, table_BGD, len(x_ND), *tensors, *ctx.numbers)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_table, grad_bias = _table_products(grad_PG, x_ND, *tensors, *ctx.numbers)
    return grad_x, grad_table, grad_bias if ctx.needs_input_grad[2] else None, *[None] * 5


def _scattered_backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    rows_PG, table_BGD, *tensors = ctx.saved_tensors
    grad_rows = grad_table = None
    if ctx.needs_input_grad[0]:
        grad_rows = _gathered_products(grad_ND, table_BGD, None, *tensors, *ctx.numbers)
    if ctx.needs_input_grad[1]:
        grad_table, _ = _table_products(rows_PG, grad_ND, *tensors, *ctx.numbers)
    return grad_rows, grad_table, *[None] * 6


def _table_backward(ctx: Any, grad_BGD: Tensor, grad_BG: Tensor) -> tuple[Tensor | None, ...]:
    rows_PG, x_ND, *tensors = ctx.saved_tensors
    grad_rows = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_rows = _gathered_products(x_ND, grad_BGD, grad_BG, *tensors, *ctx.numbers)
    if ctx.needs_input_grad[1]:
        grad_x = _scattered_products(rows_PG, grad_BGD, len(x_ND), *tensors, *ctx.numbers)
    return grad_rows, grad_x, *[None] * 5


_gathered_products.register_autograd(_gathered_backward, setup_context=_keep)
_scattered_products.register_autograd(_scattered_backward, setup_context=_keep)
_table_products.register_autograd(_table_backward, setup_context=_keep)


# FLOPs include dropped assignments: only the device knows their number.
@register_flop_formula(getattr(torch.ops, NAMESPACE).gathered_products)
def _gathered_flops(
    x_ND: Any, table_BGD: Any, bias_BG: Any, order_P: Any, *_: Any, **__: Any
) -> int:
    return 2 * order_P[0] * table_BGD[1] * table_BGD[2]


@register_flop_formula(getattr(torch.ops, NAMESPACE).scattered_products)
def _scattered_flops(rows_PG: Any, table_BGD: Any, *_: Any, **__: Any) -> int:
    return 2 * rows_PG[0] * table_BGD[1] * table_BGD[2]


@register_flop_formula(getattr(torch.ops, NAMESPACE).table_products)
def _table_flops(rows_PG: Any, x_ND: Any, *_: Any, **__: Any) -> int:
    return 2 * rows_PG[0] * rows_PG[1] * x_ND[1]
