"""Where processes run, and what a launcher such as torchrun tells them."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.trainer import Trainer
from omegaconf import DictConfig, OmegaConf

from ..compat import replace_once

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
"""Environment variables that torchrun sets in a process it starts."""


def on_cpu(cfg: Any) -> bool:
    """Return whether the command computes on CPUs."""
    return bool(cfg.common.cpu) or not torch.cuda.is_available()


def is_launched() -> bool:
    """Return whether torchrun, or another launcher like it, has started this process."""
    return all(name in os.environ for name in LAUNCHED)


def obey_launcher(options: Any) -> None:
    """Set the options of a process that torchrun has started, and its GPU.

    Args:
        options: the group ``distributed_training``.
    """
    options.distributed_world_size = int(os.environ["WORLD_SIZE"])
    options.distributed_rank = int(os.environ["RANK"])
    options.device_id = int(os.environ["LOCAL_RANK"])
    options.distributed_no_spawn = True
    if options.distributed_world_size > 1:
        options.distributed_init_method = "env://"
    if torch.cuda.is_available() and options.device_id < torch.cuda.device_count():
        torch.cuda.set_device(options.device_id)


def apply() -> None:
    """Apply every repair."""
    gather_lists_on_cpus()
    wrap_models_on_cpus()
    broadcast_plain_containers()
    compare_settings_first()
    check_divergence_on_cpus()


def gather_lists_on_cpus() -> None:
    """``all_gather_list`` goes by a GPU's memory, which a group of CPUs does not reach, whether
    there is a GPU or not. Can go when it goes by the group's device."""

    @functools.wraps(distributed_utils.all_gather_list)
    def all_gather_list(data: Any, group: Any = None, max_size: int = 16384) -> list[Any]:
        group = distributed_utils.get_global_group() if group is None else group
        if dist.get_backend(group) == "nccl":
            return original(data, group, max_size)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, utils.move_to_cpu(data), group=group)
        return gathered

    original = distributed_utils.all_gather_list
    replace_once(distributed_utils, "all_gather_list", all_gather_list)


def wrap_models_on_cpus() -> None:
    """``--ddp-backend pytorch_ddp`` names a GPU to PyTorch's wrapper. Can go when fairseq names
    none on a CPU."""

    original = distributed_fairseq_model.DistributedDataParallel

    def wrap(module: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        if next(module.parameters()).device.type == "cpu":
            kwargs |= {"device_ids": None, "output_device": None}
        return original(module=module, **kwargs)

    replace_once(distributed_fairseq_model, "DistributedDataParallel", wrap)


def broadcast_plain_containers() -> None:
    """Rank 0 reads the checkpoint and sends it to the others, configuration objects and all, which
    PyTorch refuses to receive. Sends plain containers. Can go when fairseq does."""

    @functools.wraps(distributed_utils.broadcast_object)
    def broadcast_object(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, dict) and isinstance(obj.get("cfg"), DictConfig):
            plain = OmegaConf.to_container(obj["cfg"], resolve=True, enum_to_str=True)
            obj = {**obj, "cfg": plain}
        with torch.serialization.safe_globals([distributed_utils._TensorPlaceholder]):
            return original(obj, *args, **kwargs)

    original = distributed_utils.broadcast_object
    replace_once(distributed_utils, "broadcast_object", broadcast_object)


def check_divergence_on_cpus() -> None:
    """fairseq compares the norms of the ranks' gradients on GPUs only. Can go when it always
    does."""

    @functools.wraps(Trainer.__init__)
    def __init__(self: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
        original(self, cfg, *args, **kwargs)
        if self._grad_norm_buf is None and self.data_parallel_world_size > 1:
            self._grad_norm_buf = torch.zeros(self.data_parallel_world_size, dtype=torch.float64)

    original = Trainer.__init__
    replace_once(Trainer, "__init__", __init__)


def compare_settings_first() -> None:
    """Ranks that differ in flags or code would wait for each other, or train a model that is none.
    At the latest with the trainer."""
    from .settings import check_and_compare_settings

    @functools.wraps(Trainer.__init__)
    def __init__(self: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
        check_and_compare_settings(cfg)
        original(self, cfg, *args, **kwargs)

    original = Trainer.__init__
    replace_once(Trainer, "__init__", __init__)
