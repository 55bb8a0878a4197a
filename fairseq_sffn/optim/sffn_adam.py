"""fairseq's Adam at the speed of PyTorch's fused kernel."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig
from torch import Tensor
from torch.optim.adamw import adamw

from ..errors import UsageError

HALF = (torch.float16, torch.bfloat16)


@register_optimizer("sffn_adam", dataclass=FairseqAdamConfig)
class SFFNAdam(FairseqAdam):
    """``--optimizer sffn_adam``: the update, flags and checkpoints of fairseq's ``adam``, in one
    pass over the parameters. fairseq's is a dozen passes, which over the large tables of sparse
    layers can take longer than the layers.

    Raises:
        UsageError: a flag asks for another implementation of ``adam``.
    """

    def __init__(self, cfg: Any, params: Any) -> None:
        FairseqOptimizer.__init__(self, cfg)
        for name in ("use_old_adam", "fp16_adam_stats", "tpu"):
            if getattr(cfg, name, False):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag}: is not for --optimizer sffn_adam; use --optimizer adam")
        self._optimizer = FusedAdam(params, **self.optimizer_config)


# fairseq resumes only from a checkpoint that names the same class, and the state is the same.
SFFNAdam.__name__ = FairseqAdam.__name__


class FusedAdam(Adam):
    """fairseq's ``Adam`` by PyTorch's fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    The two differ in where eps is added: fairseq's denominator is sqrt(v) + eps, PyTorch's
    sqrt(v / (1 - beta2^t)) + eps, so that eps is scaled anew for each step t.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Parameters that had no gradient at times have made fewer steps.
            by_step: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step[self._state_of(parameter)["step"]].append(parameter)
            for step, parameters in by_step.items():
                self._update(group, step, parameters)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        if parameter.grad.is_sparse:  # type: ignore[union-attr]
            raise RuntimeError("Adam does not support sparse gradients, use SparseAdam instead")
        state: dict[str, Any] = self.state[parameter]
        wide = _wide(parameter)
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(wide)
        for name in ("exp_avg", "exp_avg_sq"):  # PyTorch loads them in the parameter's dtype
            state[name] = _laid_out_like(wide, state[name])
        return state

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        wide = [_wide(parameter) for parameter in parameters]
        grads = [_laid_out_like(w, p.grad) for w, p in zip(wide, parameters, strict=True)]
        beta1, beta2 = group["betas"]
        adamw(
            wide,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), float(step), device=p.device) for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"] / math.sqrt(1 - beta2 ** (step + 1)),
            maximize=False,
        )
        for parameter, updated, state in zip(parameters, wide, states, strict=True):
            if updated is not parameter:
                parameter.copy_(updated)
            state["step"] += 1


def _wide(parameter: Tensor) -> Tensor:
    """What is updated: the parameter, or a copy in fp32 of one in half precision."""
    return parameter.float() if parameter.dtype in HALF else parameter


def _laid_out_like(like: Tensor, tensor: Tensor | None) -> Tensor:
    """The tensor in the dtype and memory layout of another, as the fused kernel needs it."""
    assert tensor is not None
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)
