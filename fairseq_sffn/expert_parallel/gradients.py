"""What becomes of gradients in several processes, where some parameters are no replicas."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from fairseq import models
from fairseq.trainer import Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..compat import replace_once
from ..criterions.routing_losses import SENT
from ..models.plugin_model import PluginModel, plugin_model_in
from ..models.process_groups import process_groups


def apply() -> None:
    """Apply all of it."""
    average_gradients_of_experts()
    count_experts_in_the_norm()
    tell_models_of_dummies()
    count_each_dummy_by_itself()
    fail_where_memory_ends()


def experts_of(parameters: Any) -> list[torch.nn.Parameter]:
    """The parameters of which other ranks have other parts."""
    return [parameter for parameter in parameters if hasattr(parameter, "expert")]


def expert_parallel_of(model: Any) -> int:
    """Processes over which a model's blocks are shared out."""
    return model.expert_parallel if isinstance(model, PluginModel) else 1


def average_gradients_of_experts() -> None:
    """A replica's gradient is the mean over all processes. That of an expert has come from all
    processes that share blocks out already; what is left is to add up over the replicas of the
    part, and to divide as for the others."""

    @functools.wraps(models.DistributedFairseqModel)
    def DistributedFairseqModel(args: Any, model: Any, process_group: Any, device: Any) -> Any:
        # Those of other plugins' models are their own matter.
        experts = experts_of(model.parameters()) if expert_parallel_of(model) > 1 else []
        if experts:
            names = [name for name, p in model.named_parameters() if hasattr(p, "expert")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        wrapped = original(args, model, process_group, device)
        if experts:
            of_replicas = getattr(wrapped, "all_reduce_grads", lambda: None)
            replicas = process_groups(expert_parallel_of(model)).replicas

            def all_reduce_grads() -> None:
                of_replicas()
                average(experts, replicas, dist.get_world_size(process_group))

            wrapped.all_reduce_grads = all_reduce_grads
        return wrapped

    original = models.DistributedFairseqModel
    replace_once(models, "DistributedFairseqModel", DistributedFairseqModel)


@torch.no_grad()
def average(experts: list[torch.nn.Parameter], replicas: Any, world_size: int) -> None:
    """Sums of the gradients over the replicas, over the world's size."""
    for parameter in experts:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(world_size)
        if dist.get_world_size(replicas) > 1:
            dist.all_reduce(parameter.grad, group=replicas)


def count_experts_in_the_norm() -> None:
    """fairseq leaves experts out of the norm that it clips by, and clips them by it."""

    @functools.wraps(Trainer.clip_grad_norm)
    def clip_grad_norm(self: Trainer, clip_norm: float) -> Tensor:
        shards = expert_parallel_of(self.get_model())
        if shards == 1:
            return original(self, clip_norm)
        # In half precision the gradients that count are those of the copies in fp32.
        parameters = getattr(self.optimizer, "fp32_params", None) or self.optimizer.params
        group = process_groups(shards).groups.blocks

        def of_all(norm: Tensor) -> Tensor:
            square = square_norm(p.grad for p in experts_of(parameters) if p.grad is not None)
            square = square.to(norm)
            dist.all_reduce(square, group=group)
            return (norm**2 + square) ** 0.5

        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=of_all)

    original = Trainer.clip_grad_norm
    replace_once(Trainer, "clip_grad_norm", clip_grad_norm)


def square_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Of all together, in single precision as fairseq's: half precision would overflow."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.stack(norms).square().sum() if norms else torch.zeros(())


def tell_models_of_dummies() -> None:
    """A rank without sentences left gets some that it has had, whose gradient fairseq drops. They
    must not count in the balance of the blocks either, which is that of all ranks' tokens."""

    @functools.wraps(Trainer._prepare_sample)
    def _prepare_sample(self: Trainer, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        sample, is_dummy = original(self, *args, **kwargs)
        if is_dummy and plugin_model_in(self.get_model()) is not None:
            sample = {**sample, "net_input": {**sample["net_input"], "is_dummy": True}}
        return sample, is_dummy

    original = Trainer._prepare_sample
    replace_once(Trainer, "_prepare_sample", _prepare_sample)


def count_each_dummy_by_itself() -> None:
    """fairseq counts none of a rank's micro-batches where the last one of an update is a dummy, and
    a dummy that is not the last as if it were real: gradients are then divided by another number of
    tokens than they come from. Counts each real one, and of dummies only what they sent. Can go
    when ``Trainer.train_step`` goes by each micro-batch."""

    @functools.wraps(Trainer._prepare_sample)
    def _prepare_sample(self: Trainer, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        sample, is_dummy = original_prepare(self, *args, **kwargs)
        if not self.model.training:  # validation has one micro-batch at a time
            return sample, is_dummy
        self.sffn_is_dummy = is_dummy
        return sample, False

    @functools.wraps(Trainer.train_step)
    def train_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        of_task = self.task.train_step

        def of_one(*args: Any, ignore_grad: bool = False, **kwargs: Any) -> tuple[Any, Any, Any]:
            ignored = ignore_grad or self.sffn_is_dummy
            loss, sample_size, logs = of_task(*args, ignore_grad=ignored, **kwargs)
            if ignored:
                sample_size = nothing_of(sample_size)
                logs = {
                    name: value if name.startswith(SENT) else nothing_of(value)
                    for name, value in logs.items()
                }
            return loss, sample_size, logs

        self.task.train_step = of_one
        try:
            return original_step(self, *args, **kwargs)
        finally:
            self.task.train_step = of_task

    original_prepare, original_step = Trainer._prepare_sample, Trainer.train_step
    replace_once(Trainer, "_prepare_sample", _prepare_sample)
    replace_once(Trainer, "train_step", train_step)


def fail_where_memory_ends() -> None:
    """A rank that is out of memory skips its micro-batch, in fairseq, and the others wait for it in
    layers that exchange something. Fails, so that the job ends. Can go when fairseq does."""

    @functools.wraps(Trainer.train_step)
    def train_step(self: Trainer, samples: Any, raise_oom: bool = False) -> Any:
        together = self.data_parallel_world_size > 1
        exchanging = together and plugin_model_in(self.get_model()) is not None
        return original(self, samples, raise_oom=raise_oom or exchanging)

    original = Trainer.train_step
    replace_once(Trainer, "train_step", train_step)


def nothing_of(value: Any) -> Any:
    """What adds nothing to others of its kind."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    return value * 0 if isinstance(value, int | float | list) else value
