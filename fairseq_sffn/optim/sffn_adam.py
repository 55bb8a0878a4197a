"""fairseq's Adam with PyTorch's fused kernel."""

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
MOMENTS = ("exp_avg", "exp_avg_sq")
# The third tensor is the maximum of the second moment so far.
AMSGRAD_MOMENTS = (*MOMENTS, "max_exp_avg_sq")


@register_optimizer("sffn_adam", dataclass=FairseqAdamConfig)
class SFFNAdam(FairseqAdam):
    """``--optimizer sffn_adam``: the update, flags and checkpoints of fairseq's ``adam``.

    It makes one pass over the parameters. fairseq's ``adam`` makes a dozen, which can take longer
    than the sparse layers with their large tables.

    Raises:
        UsageError: a flag requires another implementation of ``adam``, or a beta is not in [0, 1).
    """

    def __init__(self, cfg: Any, params: Any) -> None:
        FairseqOptimizer.__init__(self, cfg)
        for name in ("use_old_adam", "fp16_adam_stats", "tpu"):
            if getattr(cfg, name, False):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag}: is not for --optimizer sffn_adam; use --optimizer adam")
        try:
            beta1, beta2 = self.optimizer_config["betas"]
            valid = 0 <= beta1 < 1 and 0 <= beta2 < 1
        except (TypeError, ValueError, NameError, SyntaxError):  # fairseq evaluates the text
            valid = False
        if not valid:
            raise UsageError(
                f"--adam-betas {cfg.adam_betas}: must be two numbers from 0 to below 1"
            )
        self._optimizer = FusedAdam(params, **self.optimizer_config)


# fairseq resumes only from a checkpoint of an optimizer class with the same name. Both classes have
# the same state. fairseq registers a class name only once, so rename the class after registration.
SFFNAdam.__name__ = FairseqAdam.__name__


class FusedAdam(Adam):
    """fairseq's ``Adam`` by PyTorch's fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    The two add eps at different places. fairseq's denominator is sqrt(v) + eps. PyTorch's
    denominator is sqrt(v / (1 - beta2^t)) + eps. This class therefore scales eps in each step t.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # eps depends on the step. A parameter without a gradient in some updates has made fewer
            # steps.
            together: dict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                step = self._prepared_state(parameter, group)["step"]
                if parameter.dtype not in HALF and parameter.is_contiguous():
                    together[step, parameter.device].append(parameter)
                else:  # alone, so that only one is copied at a time
                    self._update(group, step, [parameter])
            for (step, _), parameters in together.items():
                self._update(group, step, parameters)
        return loss

    def _prepared_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter, new or loaded, in the layout of the kernel."""
        if parameter.grad.is_sparse:  # type: ignore[union-attr]
            raise RuntimeError("Adam does not support sparse gradients, use SparseAdam instead")
        state: dict[str, Any] = self.state[parameter]
        dtype = _wide_dtype(parameter)
        moments = AMSGRAD_MOMENTS if group.get("amsgrad") else MOMENTS
        if not state:
            state["step"] = 0
            for name in moments:
                state[name] = torch.zeros_like(parameter, dtype=dtype)
        state.setdefault("step", group.get("step", 0))  # apex stores it in the group
        for name in moments:  # PyTorch loads them in the parameter's dtype
            state[name] = state[name].to(parameter.device, dtype).contiguous()
        return state

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        """Update parameters on one device, each for the ``step + 1``-th time."""
        # The kernel expects contiguous tensors of one dtype and does not check.
        wide = [p.to(_wide_dtype(p)).contiguous() for p in parameters]
        grads = [p.grad.to(_wide_dtype(p)).contiguous() for p in parameters]  # type: ignore[union-attr]
        states = [self.state[parameter] for parameter in parameters]
        steps = torch.full((len(wide),), float(step), dtype=torch.float32, device=wide[0].device)
        beta1, beta2 = group["betas"]
        amsgrad = bool(group.get("amsgrad"))
        adamw(
            wide,
            grads,
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[state["max_exp_avg_sq"] for state in states] if amsgrad else [],
            state_steps=list(steps.unbind()),
            fused=True,
            amsgrad=amsgrad,
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


def _wide_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's update and state: fp32 for half precision."""
    return torch.float32 if parameter.dtype in HALF else parameter.dtype
