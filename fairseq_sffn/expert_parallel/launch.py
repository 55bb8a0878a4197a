"""The device of a command, and the settings of a launcher such as torchrun."""

from __future__ import annotations

import os
from typing import Any

import torch

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
"""Environment variables that torchrun sets in its processes."""


def on_cpu(cfg: Any) -> bool:
    """Return whether the command runs on the CPU."""
    return bool(cfg.common.cpu) or not torch.cuda.is_available()


def is_launched() -> bool:
    """Return whether torchrun, or a similar launcher, has started this process."""
    return all(name in os.environ for name in LAUNCHED)


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
