"""How a trainer computes an update and a validation step."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from fairseq import models, optim
from fairseq.trainer import Trainer
from fairseq.utils import has_parameters
from torch import Tensor, nn

from ..criterions.routing_losses import SENT
from ..expert_parallel.gradients import (
    ExpertGradients,
    distribute_on_cpus,
    expert_parallel_of,
    experts_of,
    ignore_experts,
    square_norm,
)
from ..models.plugin_model import plugin_model_in
from ..models.process_groups import process_groups
from ..optim.amp_optimizer import AMPOptimizer
from ..optim.moving_average import MovingAverage

logger = logging.getLogger(__name__)


class StepTrainer(Trainer):
    """A trainer for models whose ranks hold different blocks, on CPUs too.

    Each micro-batch counts by itself. fairseq counts none of a rank's micro-batches where the last
    one of an update is a dummy, and counts a dummy that is not the last as if it were real. It then
    divides gradients by another number of tokens than they come from.
    """

    _grad_norm_buf: Tensor | None
    _optimizer: Any
    _wrapped_criterion: nn.Module | None
    _wrapped_model: nn.Module | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_dummy = False
        super().__init__(*args, **kwargs)
        if self._grad_norm_buf is None and self.data_parallel_world_size > 1:
            # fairseq compares the norms of the ranks' gradients on GPUs only.
            self._grad_norm_buf = torch.zeros(self.data_parallel_world_size, dtype=torch.float64)

    @property
    def model(self) -> nn.Module:
        """The model, wrapped for data parallel training."""
        if self._wrapped_model is None and self.use_distributed_wrapper:
            self._wrapped_model = self._distribute(self._model)
        return super().model

    @property
    def criterion(self) -> nn.Module:
        """The criterion, wrapped for data parallel training where it has parameters."""
        unwrapped = self._wrapped_criterion is None and has_parameters(self._criterion)
        if unwrapped and self.use_distributed_wrapper:
            self._wrapped_criterion = self._distribute(self._criterion)
        return super().criterion

    def _distribute(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that gradients are averaged over processes; an expert's are averaged
        over its replicas."""
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

        A rank without sentences left gets some that it has had, a dummy. They must not count in the
        balance of the blocks, which is that of all ranks' tokens.

        Returns:
            The sample, and whether it is a dummy; in training ``False``, see :meth:`train_step`.
        """
        sample, is_dummy = super()._prepare_sample(sample, is_dummy)
        if is_dummy and plugin_model_in(self.get_model()) is not None:
            sample = {**sample, "net_input": {**sample["net_input"], "is_dummy": True}}
        if not self.model.training:  # validation has one micro-batch at a time
            return sample, is_dummy
        self._is_dummy = is_dummy
        return sample, False

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        """Do forward, backward and parameter update.

        A rank that is out of memory fails if it exchanges something with others: fairseq would skip
        its micro-batch, and the others would wait for it.
        """
        together = self.data_parallel_world_size > 1
        exchanges = together and plugin_model_in(self.get_model()) is not None
        hook = self.get_criterion().register_forward_hook(self._drop_dummy)
        try:
            return super().train_step(samples, raise_oom or exchanges)
        finally:
            hook.remove()

    def _drop_dummy(self, _: Any, inputs: Any, outputs: tuple[Any, Any, Any]) -> Any:
        """Replace what the criterion returns for a dummy by zeros, except what the ranks sent."""
        if not self._is_dummy:
            return outputs
        loss, sample_size, logs = outputs
        logs = {
            name: value if name.startswith(SENT) else nothing_of(value)
            for name, value in logs.items()
        }
        return loss * 0, nothing_of(sample_size), logs

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """Clip gradients by the norm of all, the experts of all ranks included."""
        shards = expert_parallel_of(self.get_model())
        if shards == 1:
            return super().clip_grad_norm(clip_norm)
        # In half precision the gradients that count are those of the copies in fp32.
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
    """Return what adds nothing to other values of its kind."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    return value * 0 if isinstance(value, int | float | list) else value
