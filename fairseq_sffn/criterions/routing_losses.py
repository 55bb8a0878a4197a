"""The losses that keep the blocks of sparse layers evenly used, for any criterion."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.constants import LOG_FORMAT_CHOICES
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter, MetersDict
from omegaconf import II
from torch import Tensor

from ..errors import UsageError
from ..memory import Selector, usage
from ..models.layer import LayerRouting


def _balance_loss(meters: Any, layer: str) -> float:
    weight = float(meters[f"_balance_weight_{layer}"].sum)
    return float(meters[f"_weighted_balance_{layer}"].sum) / weight if weight else 0.0


def _load_entropy(meters: Any, layer: str) -> float:
    return usage.load_entropy(meters[f"_counts_{layer}"].sum)


def _load_max(meters: Any, layer: str) -> float:
    return usage.load_max(meters[f"_counts_{layer}"].sum)


def _unused_blocks(meters: Any, layer: str) -> float:
    return usage.unused_blocks(meters[f"_counts_{layer}"].sum)


def _memory_usage(meters: Any, layer: str) -> float:
    return usage.memory_usage(meters[f"_counts_{layer}"].sum)


def _load_kl(meters: Any, layer: str) -> float:
    return usage.load_kl(meters[f"_importance_{layer}"].sum)


def _dropped_share(meters: Any, layer: str) -> float:
    counts, dropped = meters[f"_counts_{layer}"].sum, meters[f"_dropped_{layer}"].sum
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
SENT = "routing_sent_"
"""Begins the names of what layers sent, in the logs of a micro-batch."""
PER_LAYER = "routing_per_layer"
"""Its presence in the logs of a micro-batch asks for the ratios of each layer. The value may be on
an accelerator and is not read, since that would wait for it."""
LOOPS = ("train_inner", "valid")
"""fairseq's aggregators that are active in each step of its training and validation loops."""


@dataclass(frozen=True)
class MeanOverLayers:
    """A derived metric: the mean of a ratio over the layers that ran, which is all but where
    LayerDrop skips some; rounded for the log."""

    ratio: Callable[[Any, str], float]
    layers: list[str]

    def __call__(self, meters: Any) -> float:
        ran = [layer for layer in self.layers if meters[f"_counts_{layer}"].sum.any()]
        return round(sum(self.ratio(meters, layer) for layer in ran) / max(len(ran), 1), 4)


@dataclass
class RoutingLossConfig(FairseqDataclass):
    balance_loss_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the load-balancing loss, which is 1.0 per layer at perfect balance "
            "(default: the selector's own, 0.01 for switch and gshard, else 0)"
        },
    )
    balance_loss_reduce: ChoiceEnum(["sum", "mean"]) = field(
        default="sum", metadata={"help": "over the sparse layers"}
    )
    z_loss_weight: float = field(
        default=0.0, metadata={"help": "weight of the mean squared log-partition of the scores"}
    )
    log_format: Optional[LOG_FORMAT_CHOICES] = II("common.log_format")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")


class RoutingLosses:
    """Goes before one of fairseq's criterions among the bases of a class: adds weight * balance
    loss + weight * z loss of the sparse layers to its loss.

    What the criterion itself logs stays as it is, so that it compares with fairseq's;
    the load of the blocks is logged beside it, and ``balance_loss`` where it or the z loss has a
    weight, and in validation; for each layer too where the log is read by programs
    (``--log-format json``, tensorboard). Works with any model: without sparse layers nothing is
    added.

    The extra losses are multiplied by the sample size, as fairseq divides gradients by it. They
    are those of a micro-batch (Fedus et al. 2021, section 2.2), averaged over micro-batches by
    their sample sizes.
    """

    cfg: RoutingLossConfig

    def __init__(self, cfg: RoutingLossConfig, *args: Any) -> None:
        super().__init__(*args)
        for name in ("balance_loss_weight", "z_loss_weight"):
            if (value := getattr(cfg, name)) is not None and not 0 <= value < math.inf:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: must not be negative, infinite or NaN"
                )
        self.cfg = cfg
        self.log_layers = str(cfg.log_format) == "json" or bool(cfg.tensorboard_logdir)

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Any, Any, Any]:
        config = getattr(model, "memory_config", None)  # of a model with sparse layers
        selector = None if config is None else config.selector_class
        # In training a loss without a weight would only cost; validation logs it all the same.
        has_losses = selector is not None and (
            not model.training or any(self.weights(selector).values())
        )
        with _outputs_of(model, losses=has_losses) as outputs:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        extra = outputs[0][1]  # not every model of fairseq gives a dictionary
        if routing := extra.get("routing") if isinstance(extra, dict) else None:
            assert selector is not None
            loss = loss + self.extra_loss(selector, routing) * sample_size
            has_losses = has_losses and selector.scores_blocks
            sends = getattr(model, "expert_parallel", 1) > 1
            logging_output |= self.routing_logs(routing, sample_size, has_losses, sends)
        return loss, sample_size, logging_output

    def weights(self, selector: type[Selector]) -> dict[str, float]:
        """The weight of each loss.

        Raises:
            UsageError: a loss of scores has a weight, where the selector gives none.
        """
        balance_weight = self.cfg.balance_loss_weight
        if balance_weight is None:
            balance_weight = selector.default_balance_weight
        weights = {"balance_loss": balance_weight, "z_loss": self.cfg.z_loss_weight}
        for name, weight in weights.items():
            if weight and not selector.scores_blocks:
                option = f"--{name.replace('_', '-')}-weight {weight}"
                raise UsageError(f"{option}: {selector.name} gives blocks no score to act on")
        return weights

    def extra_loss(
        self, selector: type[Selector], routing: dict[str, LayerRouting]
    ) -> Tensor | float:
        """Weighted balance and z losses of all layers."""
        reduce = torch.mean if str(self.cfg.balance_loss_reduce) == "mean" else torch.sum
        total: Tensor | float = 0.0
        # A weight of 0 leaves the loss out, rather than send zeros back through the scores.
        for name, weight in self.weights(selector).items():
            if weight:
                losses = [getattr(layer, name) for layer in routing.values()]
                total = total + weight * reduce(torch.stack(losses))
        return total

    def routing_logs(
        self,
        routing: dict[str, LayerRouting],
        sample_size: Any,
        has_losses: bool,
        sends: bool = False,
    ) -> dict[str, Any]:
        """What adds up over micro-batches and workers, for :meth:`reduce_metrics`.

        Values may be on an accelerator, and reading them there would stall it, so that the names
        alone tell what is to be logged.

        Args:
            has_losses: whether the routing has a balance loss.
            sends: whether layers send hidden states to other processes.
        """
        logs: dict[str, Any] = {PER_LAYER: 1.0} if self.log_layers else {}
        for name, layer in routing.items():
            if has_losses:
                logs[f"routing_balance_{name}"] = layer.balance_loss.data * sample_size
                logs[f"routing_scored_{name}"] = layer.counts.any() * sample_size
            logs[f"routing_counts_{name}"] = layer.counts.data
            logs[f"routing_dropped_{name}"] = layer.dropped.data
            logs[f"routing_importance_{name}"] = layer.importance.data
            if sends:
                logs[f"{SENT}{name}"] = layer.sent.data
        return logs

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Add up what was logged, without a look at the values: fairseq calls this in each update,
        and reads what follows from the sums at its log interval."""
        super().reduce_metrics(logging_outputs)

        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        prefix = "routing_counts_"
        layers = [key.removeprefix(prefix) for key in logging_outputs[0] if key.startswith(prefix)]
        if not layers:
            return
        ratios = dict(RATIOS)
        for layer in layers:
            if f"routing_balance_{layer}" in logging_outputs[0]:
                weighted = total(f"routing_balance_{layer}")
                metrics.log_scalar_sum(f"_weighted_balance_{layer}", weighted)
                metrics.log_scalar_sum(f"_balance_weight_{layer}", total(f"routing_scored_{layer}"))
            else:
                ratios.pop("balance_loss", None)
            metrics.log_scalar_sum(f"_counts_{layer}", total(f"routing_counts_{layer}"))
            metrics.log_scalar_sum(f"_dropped_{layer}", total(f"routing_dropped_{layer}"))
            metrics.log_scalar_sum(f"_importance_{layer}", total(f"routing_importance_{layer}"))
        if f"{SENT}{layers[0]}" in logging_outputs[0]:
            sent = sum(total(f"{SENT}{layer}") for layer in layers)
            for meters in _logged_meters():
                if "sent_bytes" not in meters:
                    meters.add_meter("sent_bytes", AverageMeter(round=0), priority=10)
                meters["sent_bytes"].update(sent.double())  # whose mean is exact
        derived: dict[str, MeanOverLayers] = {}
        for name, ratio in ratios.items():
            derived[name] = MeanOverLayers(ratio, layers)
            if PER_LAYER in logging_outputs[0]:
                derived |= {f"{name}_{layer}": MeanOverLayers(ratio, [layer]) for layer in layers}
        for meters in _logged_meters():
            for name, derive in derived.items():
                if name not in meters:
                    meters.add_meter(name, MetersDict._DerivedMeter(derive), priority=20)


def _logged_meters() -> list[MetersDict]:
    """The active aggregators but the one that the trainer opens for a step.

    The trainer reads all values of that aggregator after each step, and fairseq's loops drop them.
    To read one stalls an accelerator. The loops log the values of the outer aggregators, at the log
    interval and at the end of a validation.
    """
    active = metrics.get_active_aggregators()
    in_loop = any(meters is metrics.get_meters(loop) for meters in active for loop in LOOPS)
    return active[:-1] if in_loop else active


@contextmanager
def _outputs_of(model: Any, losses: bool) -> Iterator[list[Any]]:
    """What the model returns while this is open, which the criterion keeps to itself; with or
    without the losses of its sparse layers."""
    outputs: list[Any] = []
    ask_for_losses = getattr(model, "ask_for_losses", lambda wanted: None)
    before = ask_for_losses(losses)
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
        ask_for_losses(before)
