"""Renamed PyTorch functions, under their new name in every supported version.

PyTorch 2.10 made ``grouped_mm`` public, and 2.12 renamed two collectives. This module can go when
older versions are no longer supported.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """Multiply group by group.

    Args:
        left, right: (P, X) and (B, X, Y), or (X, P) and (P, Y).
        offs: (B,) int32, the end of each group in P.

    Returns:
        (P, Y), or (B, X, Y).
    """
    return _function(F, "grouped_mm", torch, "_grouped_mm")(left, right, offs=offs)


def all_gather_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Concatenate the inputs of all ranks: (n, ...) -> (ranks * n, ...)."""
    gather = _function(dist, "all_gather_single", dist, "all_gather_into_tensor")
    gather(output, input, group=group)


def reduce_scatter_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum the inputs of all ranks, and give each rank its part: (ranks * n, ...) -> (n, ...)."""
    scatter = _function(dist, "reduce_scatter_single", dist, "reduce_scatter_tensor")
    scatter(output, input, group=group)


def _function(module: ModuleType, name: str, old_module: ModuleType, old_name: str) -> Any:
    # Looked up at each call, so that tests can replace a function of PyTorch to count traffic.
    return getattr(module, name, None) or getattr(old_module, old_name)
