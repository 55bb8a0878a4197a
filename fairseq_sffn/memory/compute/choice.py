"""The choice of the engine that runs."""

from __future__ import annotations

import torch

from .embedding_bag_kernels import pays_to_mask
from .engines import ENGINES, Engine

EMBEDDING_BAG_ELEMENTS = 2**16
"""Up to this many multiplications per block, a matrix product on a CPU costs more than it saves
(measured)."""

SMALL_BLOCK = 8
"""Blocks of fewer cells fill a small part of a matrix unit's tile."""


def choose_engine(
    device_type: str,
    dtype: torch.dtype,
    num_tokens: int,
    active_blocks: int,
    table_shape: tuple[int, int, int],
) -> Engine:
    """Return the fastest engine for these sizes among those that support them.

    ``torch.compile`` can trace ``tiled`` and ``masked`` only, so that it gets one of these.

    Args:
        device_type: ``cpu`` or an accelerator.
        dtype: of the tables.
        num_tokens: N.
        active_blocks: A.
        table_shape: (B, G, D).
    """
    num_blocks, block_size, width = table_shape
    on_cpu, compiling = device_type == "cpu", torch.compiler.is_compiling()
    if not on_cpu or compiling:
        small = block_size < SMALL_BLOCK and not on_cpu
        if small and pays_to_mask(num_tokens, active_blocks, num_blocks):
            return ENGINES["masked"]
        return ENGINES["embedding_bag" if block_size == 1 and not compiling else "tiled"]
    load = num_tokens * active_blocks / num_blocks
    few = load <= 1 or load * block_size * width <= EMBEDDING_BAG_ELEMENTS
    name = "embedding_bag" if block_size == 1 or few else "loop"
    native = ENGINES[f"native_{name}"]
    return native if native.supports(device_type, dtype, table_shape) else ENGINES[name]
