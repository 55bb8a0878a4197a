"""Repairs of fairseq that let several processes train on CPUs too, started by torchrun; and checks
before they do. Each function is one repair, safe to apply twice."""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import fairseq
import torch
import torch.distributed as dist
from fairseq import models
from fairseq.distributed import utils as distributed_utils
from fairseq_cli import train as train_command
from omegaconf import OmegaConf

from ..compat import replace_once
from ..configuration import writable
from ..errors import UsageError
from ..models.config import flag


def apply() -> None:
    """Apply every repair."""
    obey_torchrun()
    choose_gloo_on_cpus()
    compare_settings_first()
    refuse_to_spawn_nothing()
    load_models_whole()


LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
"""What torchrun tells a process it starts."""
OF_ONE_RANK = {"distributed_rank", "device_id", "distributed_init_method"}
"""Options that differ between ranks."""
OF_HYDRA = "job_logging_cfg"
"""Names a folder by the time that a process started at."""
CHOICES = {
    **{"optimizer": "--optimizer", "lr_scheduler": "--lr-scheduler", "model": "--arch"},
    **{"criterion": "--criterion", "task": "--task"},
}
"""Group of options -> the flag that chooses it, which the group calls ``_name``."""


def on_cpu(cfg: Any) -> bool:
    """Whether the command computes on CPUs."""
    return bool(cfg.common.cpu) or not torch.cuda.is_available()


def obey_torchrun() -> None:
    """fairseq divides by the number of GPUs, and takes one GPU a machine, or none, for one process
    in all. Can go when it reads WORLD_SIZE and LOCAL_RANK."""

    @functools.wraps(distributed_utils.infer_init_method)
    def infer_init_method(cfg: Any, force_distributed: bool = False) -> None:
        if cfg.distributed_init_method is not None or cfg.tpu or cfg.pipeline_model_parallel:
            return original(cfg, force_distributed)
        if is_launched():
            with writable(cfg):
                cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
                cfg.distributed_rank = int(os.environ["RANK"])
                cfg.device_id = int(os.environ["LOCAL_RANK"])
                cfg.distributed_no_spawn = True
                if cfg.distributed_world_size > 1:
                    cfg.distributed_init_method = "env://"
            if torch.cuda.is_available() and cfg.device_id < torch.cuda.device_count():
                torch.cuda.set_device(cfg.device_id)
            return None
        world_size, gpus = cfg.distributed_world_size, torch.cuda.device_count()
        by_slurm = "SLURM_STEP_NODELIST" in os.environ or "SLURM_JOB_NODELIST" in os.environ
        if world_size > max(gpus, 1) and not by_slurm:
            raise UsageError(
                f"--distributed-world-size {world_size}: is more than the {gpus} GPUs here; start "
                f'with torchrun --nproc_per_node {world_size} "$(which fairseq-train)" ...'
            )
        return original(cfg, force_distributed)

    original = distributed_utils.infer_init_method
    replace_once(distributed_utils, "infer_init_method", infer_init_method)


def is_launched() -> bool:
    """Whether torchrun, or another that tells the same, has started this process."""
    return all(name in os.environ for name in LAUNCHED)


def choose_gloo_on_cpus() -> None:
    """fairseq's default backend, nccl, is for GPUs. Can go when it looks where it runs."""

    @functools.wraps(distributed_utils.distributed_init)
    def distributed_init(cfg: Any) -> Any:
        if on_cpu(cfg) and str(cfg.distributed_training.distributed_backend) == "nccl":
            cfg.distributed_training.distributed_backend = "gloo"
        return original(cfg)

    original = distributed_utils.distributed_init
    replace_once(distributed_utils, "distributed_init", distributed_init)


def compare_settings_first() -> None:
    """Ranks that differ in flags or code would wait for each other, or train a model that is none.
    fairseq does not look. Before the model is built; or at the latest with the trainer, where
    fairseq's own processes and ``fairseq-hydra-train`` come by without it."""

    @functools.wraps(train_command.main)
    def main(cfg: Any, **kwargs: Any) -> Any:
        check_and_compare_settings(cfg)
        return original_main(cfg, **kwargs)

    original_main = train_command.main
    replace_once(train_command, "main", main)


def check_and_compare_settings(cfg: Any) -> None:
    """Raises UsageError where the settings for several processes cannot be honoured, or differ."""
    check_settings(cfg)
    together = dist.is_available() and dist.is_initialized()
    if together:
        compare_settings(cfg)
    elif is_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        # fairseq-hydra-train reads the plugin after it has looked for processes.
        raise UsageError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, which this command would "
            "let train each by itself: start fairseq-train with it, or one process"
        )


def refuse_to_spawn_nothing() -> None:
    """Given ``--distributed-init-method``, fairseq starts a process for each GPU: without any it
    ends at once, as if it had trained. Can go when it says so."""

    @functools.wraps(distributed_utils.call_main)
    def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
        options = cfg.distributed_training
        given = options.distributed_init_method is not None and not options.distributed_no_spawn
        if given and not torch.cuda.device_count():
            raise UsageError(
                f"--distributed-init-method {options.distributed_init_method}: starts a process "
                "for each GPU, and there is none here; start with torchrun --nproc_per_node "
                f'{options.distributed_world_size} "$(which fairseq-train)" ...'
            )
        return original(cfg, main, **kwargs)

    original = distributed_utils.call_main
    replace_once(distributed_utils, "call_main", call_main)


def check_settings(cfg: Any) -> None:
    """Raises UsageError where the options for several processes cannot be honoured."""
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
        # Their steps depend on all of a parameter.
        f"--optimizer {optimizer}": optimizer in ("adafactor", "lamb", "composite"),
        # Each process has a loss scale of its own, and sees the overflows of its own blocks alone.
        "--amp": common.amp,
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--zero-sharding os": str(distributed.zero_sharding) == "os",
        "--store-ema": cfg.ema.store_ema,
        "--pipeline-model-parallel": distributed.pipeline_model_parallel,
        f"--model-parallel-size {common.model_parallel_size}": common.model_parallel_size > 1,
        "--write-checkpoints-asynchronously": cfg.checkpoint.write_checkpoints_asynchronously,
        # Processes would decode differently many steps, and wait for each other.
        "--eval-bleu": getattr(cfg.task, "eval_bleu", False),
    }
    for flags, asked in refused.items():
        if asked:
            raise UsageError(f"{flags}: not {option}")


def flattens_parameters(common: Any) -> bool:
    """Whether fairseq's optimizer sees one tensor with all parameters in it."""
    return bool(common.fp16) and not (common.fp16_no_flatten_grads or common.memory_efficient_fp16)


def check_layerdrop(model: Any) -> None:
    """Raises UsageError where processes would each drop other layers, and wait for each other in
    those that exchange something."""
    for side in ("encoder", "decoder"):
        of_side = getattr(model, side, None)  # a group of options, in an encoder-decoder model
        rate = getattr(model, f"{side}_layerdrop", None) or getattr(of_side, "layerdrop", None)
        if rate:
            raise UsageError(
                f"--{side}-layerdrop {rate}: not with sparse layers in several processes, "
                "which would drop different layers"
            )


def compare_settings(cfg: Any) -> None:
    """Raises UsageError, on every rank, where ranks have different options or code."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, settings_of(cfg), group=distributed_utils.get_global_group())
    if difference := first_difference(ranks):
        raise UsageError(f"{difference}: start every process with the same flags and the same code")


def settings_of(cfg: Any) -> dict[tuple[str, str], Any]:
    """(Group, flag) -> what ranks must have in common, code included."""
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
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
    """Return the options of a group by name. fairseq's models without a dataclass have theirs in an
    ``argparse.Namespace``."""
    if isinstance(values, argparse.Namespace):
        return vars(values)
    return values if isinstance(values, dict) else {group: values}


def first_difference(ranks: list[dict[tuple[str, str], Any]]) -> str | None:
    """Where the settings of a rank are not those of rank 0, in words."""
    for rank, theirs in enumerate(ranks):
        for key in sorted(ranks[0].keys() | theirs.keys()):
            # In a tuple, so that None is not the same as none at all.
            first, other = ((own[key],) if key in own else () for own in (ranks[0], theirs))
            if first != other:
                said = [str(value[0]) if value else "missing" for value in (first, other)]
                return f"{key[1]} is {said[0]} on rank 0 and {said[1]} on rank {rank}"
    return None


def code_fingerprint() -> str:
    """Of the plugin's source: the names and contents of its files."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.cpp") for path in root.rglob(kind)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def load_models_whole() -> None:
    """A model that is loaded to be used has all its blocks, and looks at no other process's
    tokens, in however many processes it was trained."""

    @functools.wraps(models.build_model)
    def build_model(cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
        if not from_checkpoint or not hasattr(cfg, "sffn_expert_parallel"):
            return original(cfg, task, from_checkpoint)
        with writable(cfg):
            cfg.sffn_expert_parallel = 1
        model = original(cfg, task, from_checkpoint)
        model.work_alone()
        return model

    original = models.build_model
    replace_once(models, "build_model", build_model)
