"""Patches of fairseq's collective operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils

from .registry import MENDS_FAIRSEQ, patch


@patch(
    "fairseq.distributed.utils:all_gather_list",
    why="fairseq always gathers in a GPU's memory, which fails for process groups on CPUs. "
    "Training and fairseq-validate call it.",
    until="fairseq gathers on the group's device.",
    kind=MENDS_FAIRSEQ,
    written_for=("a01ae73e",),
)
def all_gather_list(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gather on CPUs if the group's backend is not nccl."""

    @functools.wraps(original)
    def wrapper(data: Any, group: Any = None, max_size: int = 16384) -> list[Any]:
        group = distributed_utils.get_global_group() if group is None else group
        if dist.get_backend(group) == "nccl":
            return original(data, group, max_size)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, utils.move_to_cpu(data), group=group)
        return gathered

    return wrapper
