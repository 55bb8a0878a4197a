"""Patch of the function with which fairseq starts processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UsageError
from ..expert_parallel.launch import check_restarts, is_launched, obey_launcher, on_cpu
from ..expert_parallel.peers import watching
from ..options.checks import check_ranges
from ..options.configuration import as_configuration
from .registry import MENDS_FAIRSEQ, patch

TORCHRUN = 'start with torchrun --nproc_per_node {} "$(which fairseq-train)" ...'


@patch(
    "fairseq.distributed.utils:call_main",
    why="fairseq starts one process per GPU. On CPUs, torchrun and the default backend do not "
    "work, or no process starts at all. A process waits half an hour for one that has vanished.",
    until="fairseq reads WORLD_SIZE and LOCAL_RANK, detects its device, and names a lost process.",
    kind=MENDS_FAIRSEQ,
    written_for=("035131c9",),
)
def call_main(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the options, read torchrun's variables, choose gloo on CPUs, and watch the others."""

    @functools.wraps(original)
    def wrapper(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> Any:
        cfg = as_configuration(cfg)
        check_ranges(cfg)
        options = cfg.distributed_training
        if options.distributed_init_method is not None:
            refuse_to_start_nothing(options)
        elif not (cfg.common.tpu or options.pipeline_model_parallel):
            if is_launched():
                check_restarts()
                obey_launcher(options)
            else:
                refuse_more_than_gpus(options)
        several = options.distributed_init_method is not None
        if several and on_cpu(cfg) and str(options.distributed_backend) == "nccl":
            options.distributed_backend = "gloo"
        if several and options.distributed_no_spawn:
            main = watching(main)
        return original(cfg, main, **kwargs)

    return wrapper


def refuse_to_start_nothing(options: Any) -> None:
    """Refuse ``--distributed-init-method`` without GPUs.

    fairseq starts a process for each GPU. Without a GPU, it ends at once, as if it had trained.

    Raises:
        UsageError: there is no GPU.
    """
    if not options.distributed_no_spawn and not torch.cuda.device_count():
        raise UsageError(
            f"--distributed-init-method {options.distributed_init_method}: starts a process "
            "for each GPU, and there is none here; "
            + TORCHRUN.format(options.distributed_world_size)
        )


def refuse_more_than_gpus(options: Any) -> None:
    """Refuse more processes than there are GPUs, unless Slurm starts them.

    Raises:
        UsageError: there are fewer GPUs.
    """
    world_size, gpus = options.distributed_world_size, torch.cuda.device_count()
    by_slurm = "SLURM_STEP_NODELIST" in os.environ or "SLURM_JOB_NODELIST" in os.environ
    if world_size > max(gpus, 1) and not by_slurm:
        raise UsageError(
            f"--distributed-world-size {world_size}: is more than the {gpus} GPUs here; "
            + TORCHRUN.format(world_size)
        )
