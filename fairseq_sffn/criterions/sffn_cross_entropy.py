"""Cross entropy with the balance and z losses of sparse layers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.dataclass.constants import DDP_BACKEND_CHOICES
from omegaconf import II
from torch import Tensor

from ..errors import UsageError
from .routing_losses import RoutingLossConfig, RoutingLosses


@dataclass
class SFFNCrossEntropyConfig(RoutingLossConfig):
    sentence_avg: bool = II("optimization.sentence_avg")
    distributed_world_size: int = II("distributed_training.distributed_world_size")
    ddp_backend: DDP_BACKEND_CHOICES = II("distributed_training.ddp_backend")


class AdaptiveCrossEntropy(CrossEntropyCriterion):
    """fairseq's token cross entropy, also for models with an adaptive softmax."""

    def __init__(self, cfg: SFFNCrossEntropyConfig, task: Any) -> None:
        super().__init__(task, cfg.sentence_avg)
        self.cfg = cfg

    def compute_loss(
        self, model: Any, net_output: Any, sample: Any, reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the loss twice, as fairseq does.

        Raises:
            UsageError: the DDP backend does not support the adaptive softmax.
        """
        adaptive_softmax = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
        if adaptive_softmax is None or not reduce:
            return super().compute_loss(model, net_output, sample, reduce)
        distributed = self.cfg.distributed_world_size > 1
        if distributed and str(self.cfg.ddp_backend) in ("c10d", "pytorch_ddp"):
            raise UsageError(
                f"--ddp-backend {self.cfg.ddp_backend}: does not support the unused clusters of "
                "--adaptive-softmax-cutoff; use legacy_ddp"
            )
        target = model.get_targets(sample, net_output)
        outputs, targets = adaptive_softmax(net_output[0], target.view(-1))
        # Padding is in the first cluster. In the other clusters, its index belongs to a word, which
        # fairseq's adaptive_loss ignores by mistake.
        ignored = [self.padding_idx] + [-100] * (len(outputs) - 1)
        losses = [
            F.cross_entropy(
                # A sum over thousands of tokens would overflow in half precision.
                output.to(torch.promote_types(output.dtype, torch.float32)),
                target,
                ignore_index=index,
                reduction="sum",
            )
            for output, target, index in zip(outputs, targets, ignored, strict=True)
            if target is not None
        ]
        loss = torch.stack(losses).sum()
        return loss, loss


@register_criterion("sffn_cross_entropy", dataclass=SFFNCrossEntropyConfig)
class SFFNCrossEntropyCriterion(RoutingLosses, AdaptiveCrossEntropy):
    """Cross entropy + weight * balance loss + weight * z loss."""

    def __init__(self, cfg: SFFNCrossEntropyConfig, task: Any) -> None:
        super().__init__(cfg, cfg, task)
