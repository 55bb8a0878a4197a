"""Functions of PyTorch that were renamed, under one name in every version.

Each name is the new one. PyTorch 2.10 made ``grouped_mm`` public and 2.12 renamed two collectives:
what is here can go when older versions are no longer supported.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """Multiply group by group: (P, X) with (B, X, Y) -> (P, Y), or (X, P) with (P, Y) -> (B, X, Y).
    ``offs`` says where in P each group ends."""
    return _of(F, "grouped_mm", torch, "_grouped_mm")(left, right, offs=offs)


def all_gather_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Put the ``input`` of each rank, one after the other, into ``output``: (n, ...) -> (ranks * n,
    ...)."""
    gather = _of(dist, "all_gather_single", dist, "all_gather_into_tensor")
    gather(output, input, group=group)


def reduce_scatter_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Add up the ``input`` of all ranks, and give each rank its part in ``output``: (ranks * n,
    ...) -> (n, ...)."""
    scatter = _of(dist, "reduce_scatter_single", dist, "reduce_scatter_tensor")
    scatter(output, input, group=group)


def _of(module: ModuleType, name: str, old_module: ModuleType, old_name: str) -> Any:
    # Looked up at each call: who replaces one of them, to count what is sent, reaches it.
    return getattr(module, name, None) or getattr(old_module, old_name)
