"""Computation of updates and validation steps by the trainer."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from fairseq import models, optim
from fairseq.trainer import Trainer
from fairseq.utils import has_parameters
from torch import Tensor, nn

from ..criterions.routing_statistics import SENT
from ..expert_parallel.gradients import (
    ExpertGradients,
    distribute_on_cpus,
    expert_parallel_of,
    experts_of,
    ignore_experts,
    shrink_buffer,
    square_norm,
)
from ..memory import SparseMemory
from ..models.plugin_model import plugin_model_in
from ..models.process_groups import process_groups
from ..optim.amp_optimizer import AMPOptimizer
from ..optim.moving_average import MovingAverage

logger = logging.getLogger(__name__)


class StepTrainer(Trainer):
    """A trainer for models whose ranks hold different blocks, on CPUs too.

    Each micro-batch counts by itself. If the last micro-batch of an update is a dummy, fairseq
    counts none of the rank's micro-batches. A dummy that is not the last one counts as real.
    fairseq then divides gradients by the wrong number of tokens.
    """

    _grad_norm_buf: Tensor | None
    _optimizer: Any
    _wrapped_criterion: nn.Module | None
    _wrapped_model: nn.Module | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_dummy = False
        super().__init__(*args, **kwargs)
        if self._grad_norm_buf is None and self.data_parallel_world_size > 1:
            # fairseq compares the gradient norms of ranks on GPUs only.
            self._grad_norm_buf = torch.zeros(self.data_parallel_world_size, dtype=torch.float64)

    @property
    def model(self) -> nn.Module:
        """The model, wrapped for data-parallel training."""
        if self._wrapped_model is None and self.use_distributed_wrapper:
            self._wrapped_model = self._distribute(self._model)
        return super().model

    @property
    def criterion(self) -> nn.Module:
        """The criterion, wrapped for data-parallel training if it has parameters."""
        unwrapped = self._wrapped_criterion is None and has_parameters(self._criterion)
        if unwrapped and self.use_distributed_wrapper:
            self._wrapped_criterion = self._distribute(self._criterion)
        return super().criterion

    def _distribute(self, module: nn.Module) -> nn.Module:
        """Wrap a module for data-parallel training.

        Gradients are averaged over processes, and those of sharded parameters over replicas.
        """
        options, group = self.cfg.distributed_training, self.data_parallel_process_group
        shards = expert_parallel_of(module)
        if shards > 1:
            ignore_experts(module)
        if self.device.type == "cpu" and options.ddp_backend in ("c10d", "pytorch_ddp"):
            wrapped = distribute_on_cpus(options, module, group)
        else:
            wrapped = models.DistributedFairseqModel(options, module, group, self.device)
        if shards == 1:
            return wrapped
        shrink_buffer(wrapped)
        replicas = process_groups(shards).replicas
        return ExpertGradients(wrapped, replicas, dist.get_world_size(group))

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        if isinstance(self._optimizer, optim.AMPOptimizer):
            self._optimizer = AMPOptimizer(self.cfg, None, self._optimizer.fp32_optimizer)

    def _build_ema(self) -> None:
        if self.cfg.ema.store_ema:
            self._ema = MovingAverage(self._model, self.cfg.ema, self.device)
            logger.info("Exponential Moving Average Shadow Model is initialized.")

    def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
        """Move a micro-batch to the device.

        A rank without sentences left repeats old ones: a dummy. Its tokens must not count in the
        balance of the blocks, which includes the tokens of all ranks.

        Returns:
            The sample, and whether it is a dummy. In training, the second value is ``False``, and
            :meth:`_drop_dummy` handles dummies.
        """
        sample, is_dummy = super()._prepare_sample(sample, is_dummy)
        if is_dummy and getattr(self.get_model(), "memory_configs", {}):
            sample = {**sample, "net_input": {**sample["net_input"], "is_dummy": True}}
        if not self.model.training:  # validation has one micro-batch per step
            return sample, is_dummy
        self._is_dummy = is_dummy
        return sample, False

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        """Do forward, backward and parameter update, and move the biases that balance the load.

        If ranks exchange data, a rank that is out of memory fails. fairseq would skip its
        micro-batch, and the other ranks would wait for it.
        """
        memories = [m for m in self.get_model().modules() if isinstance(m, SparseMemory)]
        for memory in memories:
            memory.begin_update()  # an update that overflowed left its loads
        updates = self.get_num_updates()
        together = self.data_parallel_world_size > 1
        exchanges = together and plugin_model_in(self.get_model()) is not None
        hook = self.get_criterion().register_forward_hook(self._drop_dummy)
        try:
            result = super().train_step(samples, raise_oom or exchanges)
        finally:
            hook.remove()
        if self.get_num_updates() > updates:
            for memory in memories:
                memory.end_update()
        return result

    def _drop_dummy(self, _: Any, inputs: Any, outputs: tuple[Any, Any, Any]) -> Any:
        """Replace the criterion's results for a dummy by zeros, except the bytes sent."""
        if not self._is_dummy:
            return outputs
        loss, sample_size, logs = outputs
        logs = {
            name: value if name.startswith(SENT) else nothing_of(value)
            for name, value in logs.items()
        }
        return loss * 0, nothing_of(sample_size), logs

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """Clip gradients by the norm of all gradients, with the sharded ones of all ranks.

        Args:
            clip_norm: largest norm; 0: do not clip.

        Returns:
            The norm before clipping.
        """
        shards = expert_parallel_of(self.get_model())
        if shards == 1:
            return super().clip_grad_norm(clip_norm)
        # In half precision, the optimizer uses the gradients of the fp32 copies.
        parameters = getattr(self.optimizer, "fp32_params", None) or self.optimizer.params
        group = process_groups(shards).groups.blocks

        def of_all(norm: Tensor) -> Tensor:
            square = square_norm(p.grad for p in experts_of(parameters) if p.grad is not None)
            square = square.to(norm)
            dist.all_reduce(square, group=group)
            return (norm**2 + square) ** 0.5

        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=of_all)

    def valid_step(self, sample: Any, raise_oom: bool = False) -> Any:
        """Do a forward pass in evaluation mode, in the precision of training."""
        with torch.autocast(self.device.type, enabled=bool(self.cfg.common.amp)):
            return super().valid_step(sample, raise_oom)


def nothing_of(value: Any) -> Any:
    """Return a zero of the same type and shape; values that are not numbers stay unchanged."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    return value * 0 if isinstance(value, int | float | list) else value
