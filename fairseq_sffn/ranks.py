"""Values of all ranks of a training. All ranks call these functions together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils


def rank() -> int:
    """Return the rank of this process; 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    if world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0, group=distributed_utils.get_global_group())
    return said[0]


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order, on every rank."""
    values = [value]
    if world_size() > 1:
        values *= world_size()
        dist.all_gather_object(values, value, group=distributed_utils.get_global_group())
    return values
