"""Checks of the options for several processes, and comparison of options and code between ranks."""

from __future__ import annotations

import argparse
import os
from typing import Any

import fairseq
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from ..errors import UsageError, flag
from ..fingerprint import code_fingerprint
from ..ranks import gathered
from .launch import is_launched, on_cpu

OF_ONE_RANK = {"distributed_rank", "device_id", "distributed_init_method"}
"""Options that may differ between ranks."""
OF_HYDRA = "job_logging_cfg"
"""Option group that may differ: it names a folder by the start time of the process."""
CHOICES = {
    **{"optimizer": "--optimizer", "lr_scheduler": "--lr-scheduler", "model": "--arch"},
    **{"criterion": "--criterion", "task": "--task"},
}
"""Option group -> flag that chooses its ``_name``."""


def check_and_compare_settings(cfg: Any) -> None:
    """Check the options for several processes, and compare them between ranks.

    All ranks call it together.

    Raises:
        UsageError: an option is not supported, or ranks differ.
    """
    check_settings(cfg)
    together = dist.is_available() and dist.is_initialized()
    if together:
        compare_settings(cfg)
    elif is_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        # fairseq-hydra-train imports the plugin after it has set up processes.
        raise UsageError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, which this command would "
            "let train each by itself: start fairseq-train with it, or one process"
        )


def check_settings(cfg: Any) -> None:
    """Check the options for several processes.

    Raises:
        UsageError: an option is not supported.
    """
    distributed, common = cfg.distributed_training, cfg.common
    backend = str(distributed.ddp_backend)
    if backend == "fully_sharded" and on_cpu(cfg):
        raise UsageError("--ddp-backend fully_sharded: needs GPUs, and this command runs on CPUs")
    if not hasattr(cfg.model, "sffn_expert_parallel"):
        return
    if distributed.distributed_world_size > 1:
        check_layerdrop(cfg.model)
    shards = cfg.model.sffn_expert_parallel
    if shards == 1:
        return
    option = f"with --sffn-expert-parallel {shards}"
    if backend not in ("pytorch_ddp", "c10d", "legacy_ddp", "no_c10d"):
        raise UsageError(f"--ddp-backend {backend}: not {option}; use pytorch_ddp or legacy_ddp")
    if flattens_parameters(common):
        raise UsageError(f"--fp16: needs --fp16-no-flatten-grads {option}")
    optimizer = str(cfg.optimizer._name)
    refused = {
        # Their steps depend on the whole parameter.
        f"--optimizer {optimizer}": optimizer in ("adafactor", "lamb", "composite"),
        # Each process has its own loss scale, and sees only the overflows of its own blocks.
        "--amp": common.amp,
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--zero-sharding os": str(distributed.zero_sharding) == "os",
        "--store-ema": cfg.ema.store_ema,
        "--pipeline-model-parallel": distributed.pipeline_model_parallel,
        f"--model-parallel-size {common.model_parallel_size}": common.model_parallel_size > 1,
        "--write-checkpoints-asynchronously": cfg.checkpoint.write_checkpoints_asynchronously,
        # Processes would decode different numbers of steps, and wait for each other forever.
        "--eval-bleu": getattr(cfg.task, "eval_bleu", False),
    }
    for flags, asked in refused.items():
        if asked:
            raise UsageError(f"{flags}: not {option}")


def flattens_parameters(common: Any) -> bool:
    """Return whether fairseq's optimizer has one tensor with all parameters."""
    return bool(common.fp16) and not (common.fp16_no_flatten_grads or common.memory_efficient_fp16)


def check_layerdrop(model: Any) -> None:
    """Refuse LayerDrop.

    Each process would drop different layers, and wait for the others in layers that exchange
    tokens.

    Raises:
        UsageError: LayerDrop is on.
    """
    for side in ("encoder", "decoder"):
        of_side = getattr(model, side, None)  # a group of options, in an encoder-decoder model
        rate = getattr(model, f"{side}_layerdrop", None) or getattr(of_side, "layerdrop", None)
        if rate:
            raise UsageError(
                f"--{side}-layerdrop {rate}: not with sparse layers in several processes, "
                "which would drop different layers"
            )


def compare_settings(cfg: Any) -> None:
    """Compare options and code between ranks.

    Raises:
        UsageError: on every rank, if they differ.
    """
    if difference := first_difference(gathered(settings_of(cfg))):
        raise UsageError(f"{difference}: start every process with the same flags and the same code")


def settings_of(cfg: Any) -> dict[tuple[str, str], Any]:
    """Return the options and versions that all ranks must share: (group, flag) -> value."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    options = {
        (group, name): value
        for group, values in plain.items()
        if group != OF_HYDRA
        for name, value in options_of(group, values).items()
        if name not in OF_ONE_RANK
    }
    options = {
        (group, CHOICES.get(group, group) if name == "_name" else flag(name)): value
        for (group, name), value in options.items()
    }
    versions = {"PyTorch": torch.__version__, "fairseq": fairseq.__version__}
    versions["fairseq_sffn's code"] = code_fingerprint()
    return options | {("", name): version for name, version in versions.items()}


def options_of(group: str, values: Any) -> dict[str, Any]:
    """Return the options of a group by name.

    fairseq's models without a dataclass have their options in an ``argparse.Namespace``.
    """
    if isinstance(values, argparse.Namespace):
        return vars(values)
    return values if isinstance(values, dict) else {group: values}


def first_difference(ranks: list[dict[tuple[str, str], Any]]) -> str | None:
    """Return in words the first difference between a rank and rank 0; ``None``: there is none."""
    for rank, theirs in enumerate(ranks):
        for key in sorted(ranks[0].keys() | theirs.keys()):
            # A tuple distinguishes the value None from a missing option.
            first, other = ((own[key],) if key in own else () for own in (ranks[0], theirs))
            if first != other:
                said = [str(value[0]) if value else "missing" for value in (first, other)]
                return f"{key[1]} is {said[0]} on rank 0 and {said[1]} on rank {rank}"
    return None
