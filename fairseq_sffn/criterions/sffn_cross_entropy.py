"""Cross entropy plus the losses that keep the blocks of sparse layers evenly used."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.constants import DDP_BACKEND_CHOICES, LOG_FORMAT_CHOICES
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from ..errors import UsageError
from ..memory import Selector, usage
from ..models.layer import LayerRouting


def _balance_loss(meters: Any, number: int) -> float:
    return float(meters[f"_balance_{number}"].avg)


def _load_entropy(meters: Any, number: int) -> float:
    return usage.load_entropy(meters[f"_counts_{number}"].sum)


def _load_max(meters: Any, number: int) -> float:
    return usage.load_max(meters[f"_counts_{number}"].sum)


def _unused_blocks(meters: Any, number: int) -> float:
    return usage.unused_blocks(meters[f"_counts_{number}"].sum)


def _memory_usage(meters: Any, number: int) -> float:
    return usage.memory_usage(meters[f"_counts_{number}"].sum)


def _load_kl(meters: Any, number: int) -> float:
    return usage.load_kl(meters[f"_mass_{number}"].sum)


def _dropped_share(meters: Any, number: int) -> float:
    counts, dropped = meters[f"_counts_{number}"].sum, meters[f"_dropped_{number}"].sum
    return usage.dropped_share(counts, dropped)


RATIOS = {
    "balance_loss": _balance_loss,
    "load_entropy": _load_entropy,
    "load_max": _load_max,
    "unused_blocks": _unused_blocks,
    "memory_usage": _memory_usage,
    "load_kl": _load_kl,
    "dropped_share": _dropped_share,
}
"""What is logged -> how it follows from the meters of a layer, which hold sums."""


@dataclass(frozen=True)
class MeanOverLayers:
    """A derived metric: the mean of a ratio over layers, rounded for the log."""

    ratio: Callable[[Any, int], float]
    layers: list[int]

    def __call__(self, meters: Any) -> float:
        return round(sum(self.ratio(meters, n) for n in self.layers) / len(self.layers), 4)


@dataclass
class SFFNCrossEntropyConfig(FairseqDataclass):
    balance_loss_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the load-balancing loss, which is 1.0 per layer at perfect balance "
            "(default: the selector's own, 0.01 for switch, 0 for avgk)"
        },
    )
    balance_loss_reduce: ChoiceEnum(["sum", "mean"]) = field(
        default="sum", metadata={"help": "over the sparse layers"}
    )
    z_loss_weight: float = field(
        default=0.0, metadata={"help": "weight of the mean squared log-partition of the scores"}
    )
    sentence_avg: bool = II("optimization.sentence_avg")
    distributed_world_size: int = II("distributed_training.distributed_world_size")
    ddp_backend: DDP_BACKEND_CHOICES = II("distributed_training.ddp_backend")
    log_format: Optional[LOG_FORMAT_CHOICES] = II("common.log_format")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")


@register_criterion("sffn_cross_entropy", dataclass=SFFNCrossEntropyConfig)
class SFFNCrossEntropyCriterion(CrossEntropyCriterion):
    """Token cross entropy + weight * balance loss + weight * z loss.

    ``loss`` and ``ppl`` in the logs are the language model's alone, so that they compare with
    fairseq's ``cross_entropy``; ``balance_loss`` and the load of the blocks are logged beside
    them, for each layer too where the log is read by programs (``--log-format json``,
    tensorboard). Works with any model: without sparse layers it is plain cross entropy.

    The extra losses are multiplied by the sample size, as fairseq divides gradients by it. They
    are those of a micro-batch (Fedus et al. 2021, section 2.2), averaged over micro-batches by
    their sample sizes.
    """

    def __init__(self, cfg: SFFNCrossEntropyConfig, task: Any) -> None:
        super().__init__(task, cfg.sentence_avg)
        for name in ("balance_loss_weight", "z_loss_weight"):
            if (value := getattr(cfg, name)) is not None and not 0 <= value < math.inf:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: must not be negative, infinite or NaN"
                )
        self.cfg = cfg
        self.log_layers = str(cfg.log_format) == "json" or bool(cfg.tensorboard_logdir)

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, Any]:
        net_output = model(**sample["net_input"])
        loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        extra = net_output[1]  # not every model of fairseq gives a dictionary
        if routing := extra.get("routing") if isinstance(extra, dict) else None:
            selector = model.memory_config.selector_class
            loss = loss + self.extra_loss(selector, routing) * sample_size
            logging_output |= self.routing_logs(selector, routing, sample_size)
        return loss, sample_size, logging_output

    def extra_loss(
        self, selector: type[Selector], routing: dict[int, LayerRouting]
    ) -> Tensor | float:
        """Weighted balance and z losses of all layers."""
        balance_weight = self.cfg.balance_loss_weight
        if balance_weight is None:
            balance_weight = selector.default_balance_weight
        weights = {"balance_loss": balance_weight, "z_loss": self.cfg.z_loss_weight}
        reduce = torch.mean if str(self.cfg.balance_loss_reduce) == "mean" else torch.sum
        total: Tensor | float = 0.0
        # A weight of 0 leaves the loss out, rather than send zeros back through the scores.
        for name, weight in weights.items():
            if weight and not selector.scores_blocks:
                option = f"--{name.replace('_', '-')}-weight {weight}"
                raise UsageError(f"{option}: {selector.name} gives blocks no score to act on")
            if weight:
                losses = [getattr(layer, name) for layer in routing.values()]
                total = total + weight * reduce(torch.stack(losses))
        return total

    def routing_logs(
        self, selector: type[Selector], routing: dict[int, LayerRouting], sample_size: Any
    ) -> dict[str, Any]:
        """What adds up over micro-batches and workers, for :meth:`reduce_metrics`."""
        logs: dict[str, Any] = {"routing_per_layer": float(self.log_layers)}
        for number, layer in routing.items():
            if selector.scores_blocks:
                logs[f"routing_balance_{number}"] = layer.balance_loss.data * sample_size
            logs[f"routing_counts_{number}"] = layer.counts.data
            logs[f"routing_dropped_{number}"] = layer.dropped.data
            logs[f"routing_mass_{number}"] = layer.mass.data
        return logs

    def compute_loss(
        self, model: Any, net_output: Any, sample: Any, reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
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
        # Padding is in the first cluster; in the others its index is that of a word, which
        # fairseq's adaptive_loss leaves out.
        ignored = [self.padding_idx] + [-100] * (len(outputs) - 1)
        losses = [
            F.cross_entropy(output, target, ignore_index=index, reduction="sum")
            for output, target, index in zip(outputs, targets, ignored, strict=True)
            if target is not None
        ]
        loss = torch.stack(losses).sum()
        return loss, loss

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        CrossEntropyCriterion.reduce_metrics(logging_outputs)

        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        prefix = "routing_counts_"
        layers = [
            int(key.removeprefix(prefix)) for key in logging_outputs[0] if key.startswith(prefix)
        ]
        if not layers:
            return
        sample_size = total("sample_size")
        ratios = dict(RATIOS)
        for number in layers:
            if f"routing_balance_{number}" in logging_outputs[0]:
                balance = total(f"routing_balance_{number}") / sample_size
                metrics.log_scalar(f"_balance_{number}", balance, sample_size)
            else:
                ratios.pop("balance_loss", None)
            metrics.log_scalar_sum(f"_counts_{number}", total(f"routing_counts_{number}"))
            metrics.log_scalar_sum(f"_dropped_{number}", total(f"routing_dropped_{number}"))
            metrics.log_scalar_sum(f"_mass_{number}", total(f"routing_mass_{number}"))
        for name, ratio in ratios.items():
            metrics.log_derived(name, MeanOverLayers(ratio, layers))
            if total("routing_per_layer"):
                for number in layers:
                    metrics.log_derived(f"{name}_layer{number}", MeanOverLayers(ratio, [number]))
