"""Collective operations of ``torch.distributed`` under one name in every version of PyTorch.

PyTorch 2.12 renamed two of them; each name is the new one. Can go when 2.11 is no longer supported.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Put the ``input`` of each rank, one after the other, into ``output``: (n, ...) -> (ranks * n,
    ...)."""
    _renamed("all_gather_single", "all_gather_into_tensor")(output, input, group=group)


def reduce_scatter_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Add up the ``input`` of all ranks, and give each rank its part in ``output``: (ranks * n,
    ...) -> (n, ...)."""
    _renamed("reduce_scatter_single", "reduce_scatter_tensor")(output, input, group=group)


def _renamed(name: str, old_name: str) -> Any:
    # Looked up at each call: who replaces one of them, to count what is sent, reaches it.
    return getattr(dist, name if hasattr(dist, name) else old_name)
