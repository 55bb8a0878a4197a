"""The process groups of expert-parallel training."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from ..errors import UsageError
from ..memory import ProcessGroups


class ExpertParallelGroups(NamedTuple):
    """The groups of this process.

    Attributes:
        groups: the group of all processes, whose tokens count together, and the group over which
            the blocks of each layer are sharded.
        replicas: the group of the processes that hold the same blocks; ``None``: every process has
            all blocks.
    """

    groups: ProcessGroups
    replicas: dist.ProcessGroup | None = None


def process_groups(expert_parallel: int) -> ExpertParallelGroups:
    """Return this process's groups. All processes call it together.

    Blocks are sharded over consecutive ranks. Each call returns the same groups.

    Args:
        expert_parallel: number of processes over which the blocks are sharded.

    Raises:
        UsageError: the number does not divide the number of processes.
    """
    return _process_groups(expert_parallel, dist.group.WORLD if dist.is_initialized() else None)


@functools.cache
def _process_groups(expert_parallel: int, world: dist.ProcessGroup | None) -> ExpertParallelGroups:
    """Return the groups within ``world``.

    ``world`` is a key of the cache, because a program may train alone before it joins others.
    """
    world_size = distributed_utils.get_global_world_size()
    if expert_parallel < 1 or world_size % expert_parallel:
        raise UsageError(
            f"--sffn-expert-parallel {expert_parallel}: does not divide the number of processes, "
            f"{world_size}"
        )
    if world_size == 1:
        return ExpertParallelGroups(ProcessGroups())
    tokens = distributed_utils.get_data_parallel_group()
    if expert_parallel == 1:
        return ExpertParallelGroups(ProcessGroups(tokens))
    ranks = range(world_size)
    blocks = distributed_utils.new_groups(
        [list(ranks[i : i + expert_parallel]) for i in ranks[::expert_parallel]]
    )
    replicas = distributed_utils.new_groups(
        [list(ranks[i::expert_parallel]) for i in range(expert_parallel)]
    )
    return ExpertParallelGroups(ProcessGroups(tokens, blocks), replicas)
