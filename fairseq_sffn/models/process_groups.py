"""Which processes do what together."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from ..errors import UsageError
from ..memory.exchange import ProcessGroups


class ExpertParallelGroups(NamedTuple):
    """The groups that this process belongs to.

    Attributes:
        groups: the group of all, whose tokens count together, and that over which the blocks of
            each layer are shared out.
        replicas: those that hold the same blocks, one in each group over which they are shared
            out; ``None`` where every process has all blocks.
    """

    groups: ProcessGroups
    replicas: dist.ProcessGroup | None = None


def process_groups(expert_parallel: int) -> ExpertParallelGroups:
    """Groups of consecutive ranks share blocks out, the same ones at each call. To be called by all
    processes together.

    Args:
        expert_parallel: processes over which the blocks are shared out.

    Raises:
        UsageError: it does not divide the number of processes.
    """
    return _process_groups(expert_parallel, dist.group.WORLD if dist.is_initialized() else None)


@functools.cache
def _process_groups(expert_parallel: int, world: dist.ProcessGroup | None) -> ExpertParallelGroups:
    """Those within ``world``: a program may train by itself before it joins others."""
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
