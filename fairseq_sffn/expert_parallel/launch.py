"""The device of a command, and the settings of a launcher such as torchrun."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..errors import UsageError

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
"""Environment variables that torchrun sets in its processes."""


def on_cpu(cfg: Any) -> bool:
    """Return whether the command runs on the CPU."""
    return bool(cfg.common.cpu) or not torch.cuda.is_available()


def is_launched() -> bool:
    """Return whether torchrun, or a similar launcher, has started this process."""
    return all(name in os.environ for name in LAUNCHED)


def check_restarts() -> None:
    """Refuse restarts by torchrun that would never start to train.

    The store in which processes meet would still have the addresses of the attempt before
    (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        UsageError: torchrun may restart this process, and shares the store between attempts.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if restarts and shared and int(os.environ["WORLD_SIZE"]) > 1:
        raise UsageError(
            f"torchrun --max-restarts {restarts}: restarted processes would wait for those of the "
            "attempt before; start torchrun with --rdzv_backend c10d and the environment variable "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def obey_launcher(options: Any) -> None:
    """Set the options and the GPU of this process from the variables of its launcher.

    Args:
        options: the option group ``distributed_training``.
    """
    options.distributed_world_size = int(os.environ["WORLD_SIZE"])
    options.distributed_rank = int(os.environ["RANK"])
    options.device_id = int(os.environ["LOCAL_RANK"])
    options.distributed_no_spawn = True
    if options.distributed_world_size > 1:
        options.distributed_init_method = "env://"
    if torch.cuda.is_available() and options.device_id < torch.cuda.device_count():
        torch.cuda.set_device(options.device_id)
