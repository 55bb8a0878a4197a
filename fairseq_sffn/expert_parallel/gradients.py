"""Gradient synchronisation for expert-parallel (non-replicated) parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import (
    DistributedTimeoutWrapper,
    LegacyDistributedDataParallel,
    ModuleProxyWrapper,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.plugin_model import PluginModel


def experts_of(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the sharded parameters, of which each rank holds a part."""
    return [parameter for parameter in parameters if hasattr(parameter, "expert")]


def expert_parallel_of(model: Any) -> int:
    """Return the number of processes over which a model's blocks are sharded; 1: none are."""
    return model.expert_parallel if isinstance(model, PluginModel) else 1


class ExpertGradients(ModuleProxyWrapper):
    """Wrapper for data-parallel training that also averages the gradients of sharded parameters.

    The gradient of a replicated parameter is the mean over all processes. The gradient of a sharded
    parameter already includes all processes among which its blocks are sharded. It is summed over
    the replicas of the part, and divided by the number of processes as well.

    Args:
        module: the model in fairseq's wrapper, which ignores sharded parameters.
        replicas: group of the processes that hold the same blocks.
        world_size: number of processes.
    """

    def __init__(self, module: nn.Module, replicas: Any, world_size: int) -> None:
        super().__init__(module)
        self._replicas, self._world_size = replicas, world_size

    def all_reduce_grads(self) -> None:
        """Average the gradients. fairseq calls it after the last backward pass of an update."""
        if (of_replicated := getattr(self.module, "all_reduce_grads", None)) is not None:
            of_replicated()
        average(experts_of(self.parameters()), self._replicas, self._world_size)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)


@torch.no_grad()
def average(experts: list[nn.Parameter], replicas: Any, world_size: int) -> None:
    """Sum gradients over replicas, and divide them by the number of processes, in place.

    Args:
        experts: sharded parameters.
        replicas: group of the processes that hold the same blocks.
        world_size: number of processes.
    """
    for parameter in experts:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(world_size)
        if dist.get_world_size(replicas) > 1:
            dist.all_reduce(parameter.grad, group=replicas)


def ignore_experts(model: nn.Module) -> None:
    """Make PyTorch's DistributedDataParallel ignore a model's sharded parameters."""
    names = [name for name, parameter in model.named_parameters() if hasattr(parameter, "expert")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def shrink_buffer(wrapped: nn.Module) -> None:
    """Make ``legacy_ddp`` send the gradients of replicated parameters only.

    It sends its whole buffer, which has room for all parameters.
    """
    for module in wrapped.modules():
        if isinstance(module, LegacyDistributedDataParallel):
            sharded = sum(parameter.numel() for parameter in experts_of(module.parameters()))
            whole = sum(parameter.numel() for parameter in module.parameters())
            module.buffer_size = min(module.buffer_size, whole - sharded)


def distribute_on_cpus(options: Any, module: nn.Module, process_group: Any) -> nn.Module:
    """Wrap a module on the CPU as fairseq does for ``--ddp-backend pytorch_ddp`` on a GPU.

    Args:
        options: the option group ``distributed_training``.
        module: the model or the criterion.
        process_group: group of the processes over which gradients are averaged.
    """
    distributed = DistributedDataParallel(
        module=module,
        broadcast_buffers=options.broadcast_buffers,
        bucket_cap_mb=options.bucket_cap_mb,
        process_group=process_group,
        find_unused_parameters=options.find_unused_parameters,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
    )
    if options.ddp_comm_hook == "fp16":
        from torch.distributed.algorithms.ddp_comm_hooks import (
            DDPCommHookType,
            register_ddp_comm_hook,
        )

        register_ddp_comm_hook(DDPCommHookType.FP16_COMPRESS, distributed)
    wrapped: nn.Module = ModuleProxyWrapper(distributed)
    if options.heartbeat_timeout > 0:
        wrapped = DistributedTimeoutWrapper(wrapped, timeout=options.heartbeat_timeout)
    return wrapped


def square_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the squared norm of all gradients together: a scalar.

    It is in fp32, as in fairseq, because half precision would overflow.
    """
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.stack(norms).square().sum() if norms else torch.zeros(())
