"""Balance and z losses, and statistics of routing, for any criterion."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.constants import LOG_FORMAT_CHOICES
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter, MetersDict
from omegaconf import II
from torch import Tensor

from ..errors import UsageError
from ..memory import Selector, usage
from ..models.layer import LayerRouting


class Ratio(NamedTuple):
    """A logged value, computed from the sums of a layer over micro-batches.

    Attributes:
        function: computes the value from the sums.
        sums: names of the sums in ``SUMS``.
    """

    function: Callable[..., float]
    sums: tuple[str, ...]


def _mean(weighted: Any, weight: Any) -> float:
    return float(weighted) / float(weight) if float(weight) else 0.0


SUMS = {
    "counts": "routing_counts_",
    "dropped": "routing_dropped_",
    "importance": "routing_importance_",
    "weighted_balance": "routing_balance_",
    "balance_weight": "routing_scored_",
}
"""Name of a sum of a layer -> prefix of its key in the logs of a micro-batch."""
RATIOS = {
    "balance_loss": Ratio(_mean, ("weighted_balance", "balance_weight")),
    "load_entropy": Ratio(usage.load_entropy, ("counts",)),
    "load_max": Ratio(usage.load_max, ("counts",)),
    "unused_blocks": Ratio(usage.unused_blocks, ("counts",)),
    "memory_usage": Ratio(usage.memory_usage, ("counts",)),
    "load_kl": Ratio(usage.load_kl, ("importance",)),
    "dropped_share": Ratio(usage.dropped_share, ("counts", "dropped")),
}
"""Name in fairseq's log -> ratio."""
SENT = "routing_sent_"
"""Prefix of the key of the bytes that a layer sent, in the logs of a micro-batch."""
PER_LAYER = "routing_per_layer"
"""Key in the logs of a micro-batch. If it is there, the ratios of each layer are logged too.

Its value is not read, because it may be on an accelerator and the host would wait for it."""
LOOPS = ("train_inner", "valid")
"""Names of fairseq's aggregators that are active during its training and validation loops."""


@dataclass(frozen=True)
class MeanOverLayers:
    """A derived metric: the mean of a ratio over the layers that ran, rounded for the log.

    LayerDrop may have skipped some layers.

    Attributes:
        ratio: the ratio.
        layers: names of the layers.
    """

    ratio: Ratio
    layers: list[str]

    def __call__(self, meters: Any) -> float:
        def sums(layer: str, names: tuple[str, ...]) -> list[Any]:
            return [meters[f"_{name}_{layer}"].sum for name in names]

        ran = [layer for layer in self.layers if sums(layer, ("counts",))[0].any()]
        values = [self.ratio.function(*sums(layer, self.ratio.sums)) for layer in ran]
        return round(sum(values) / max(len(ran), 1), 4)


@dataclass
class RoutingLossConfig(FairseqDataclass):
    balance_loss_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the balance loss, which is 1.0 per layer at perfect balance, and "
            "minus the entropy of the mean router softmax for sigma_moe (default: the selector's "
            "own: 0.01 for switch and gshard, 0.001 for sigma_moe, else 0)"
        },
    )
    balance_loss_reduce: ChoiceEnum(["sum", "mean"]) = field(  # type: ignore[valid-type]
        default="sum", metadata={"help": "how the balance losses of the sparse layers are combined"}
    )
    z_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the router z-loss, the mean squared log-sum-exp of the scores"
        },
    )
    log_format: Optional[LOG_FORMAT_CHOICES] = II("common.log_format")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")


class RoutingLosses(FairseqCriterion):
    """Base class to put before one of fairseq's criterions: adds the losses of the sparse layers.

    The loss is fairseq's loss + weight * balance loss + weight * z loss. The logged ``loss`` is
    fairseq's loss alone, so that it is comparable. The load of the blocks is logged beside it.
    ``balance_loss`` is logged in validation, and in training if it or the z loss has a weight. With
    ``--log-format json`` or tensorboard, each ratio is also logged for each layer. A model without
    sparse layers trains as with fairseq's criterion.

    The extra losses are losses of a micro-batch (Fedus et al. 2021, section 2.2). They are
    multiplied by the sample size, because fairseq divides gradients by it. Over micro-batches, they
    are therefore averaged with the sample sizes as weights.

    Raises:
        UsageError: a weight is negative, infinite or NaN.
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
        """Return the loss, the sample size and the logs of a micro-batch, as fairseq does.

        Args:
            model: any model.
            sample: a micro-batch.
            reduce: see fairseq's criterion.

        Raises:
            UsageError: a loss has a weight, but the selector has no scores.
        """
        if (selector := selector_of(model)) is None:
            return super().forward(model, sample, reduce)
        # In training, a loss without a weight would only take time. Validation logs it.
        wanted = not model.training or any(self.weights(selector).values())
        net_input = {**sample["net_input"], "routing_losses": wanted}
        sample = {**sample, "net_input": net_input}  # a copy, to which compute_loss adds routing
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        routing = sample["routing"]
        loss = loss + self.extra_loss(selector, routing) * sample_size
        sends = getattr(model, "expert_parallel", 1) > 1
        has_losses = wanted and selector.scores_blocks
        logging_output |= self.routing_logs(routing, sample_size, has_losses, sends)
        return loss, sample_size, logging_output

    def compute_loss(
        self, model: Any, net_output: Any, sample: Any, reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return fairseq's losses, and store the routing of ``net_output`` in the sample.

        fairseq's ``forward`` does not return ``net_output``. :meth:`forward` made the sample for
        this call only.
        """
        if selector_of(model) is not None:
            sample["routing"] = net_output[1]["routing"]
        return super().compute_loss(model, net_output, sample, reduce)

    def weights(self, selector: type[Selector]) -> dict[str, float]:
        """Return name of each loss -> weight.

        Raises:
            UsageError: a loss has a weight, but the selector has no scores, or does not select by
                them.
        """
        balance_weight = self.cfg.balance_loss_weight
        if balance_weight is None:
            balance_weight = selector.default_balance_weight
        weights = {"balance_loss": balance_weight, "z_loss": self.cfg.z_loss_weight}
        for name, weight in weights.items():
            if weight and not selector.scores_blocks:
                option = f"--{name.replace('_', '-')}-weight {weight}"
                raise UsageError(f"{option}: {selector.name} gives blocks no score to act on")
        if balance_weight and not selector.selects_by_scores:
            option = f"--balance-loss-weight {balance_weight}"
            raise UsageError(f"{option}: {selector.name} selects by a fixed table")
        return weights

    def extra_loss(
        self, selector: type[Selector], routing: dict[str, LayerRouting]
    ) -> Tensor | float:
        """Return the weighted balance and z losses of all layers: a scalar."""
        reduce = torch.mean if str(self.cfg.balance_loss_reduce) == "mean" else torch.sum
        total: Tensor | float = 0.0
        # A loss of weight 0 is left out, so that no zero gradients flow through the scores.
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
        """Return the sums of a micro-batch, which :meth:`reduce_metrics` adds up.

        Values stay on the accelerator, because reading them would make the host wait. The keys
        alone determine what is logged.

        Args:
            routing: name of each sparse layer -> routing.
            sample_size: weight of the micro-batch.
            has_losses: whether the routing has a balance loss.
            sends: whether layers send hidden states to other processes.

        Returns:
            Key -> sum.
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
        """Add up the logs of micro-batches and processes.

        fairseq calls this function in each update, and reads values at its log interval. The
        function itself reads no value.
        """
        super().reduce_metrics(logging_outputs)
        first = logging_outputs[0]
        prefix = SUMS["counts"]
        layers = [key.removeprefix(prefix) for key in first if key.startswith(prefix)]
        if not layers:
            return

        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        logged = [name for name, prefix in SUMS.items() if f"{prefix}{layers[0]}" in first]
        for layer in layers:
            for name in logged:
                metrics.log_scalar_sum(f"_{name}_{layer}", total(f"{SUMS[name]}{layer}"))
        if f"{SENT}{layers[0]}" in first:
            sent = sum(total(f"{SENT}{layer}") for layer in layers)
            for meters in _logged_meters():
                if "sent_bytes" not in meters:
                    meters.add_meter("sent_bytes", AverageMeter(round=0), priority=10)
                meters["sent_bytes"].update(sent.double())  # fp64: the mean is exact
        derived: dict[str, MeanOverLayers] = {}
        for name, ratio in RATIOS.items():
            if not set(ratio.sums) <= set(logged):
                continue
            derived[name] = MeanOverLayers(ratio, layers)
            if PER_LAYER in first:
                derived |= {f"{name}_{layer}": MeanOverLayers(ratio, [layer]) for layer in layers}
        for meters in _logged_meters():
            for name, derive in derived.items():
                if name not in meters:
                    meters.add_meter(name, MetersDict._DerivedMeter(derive), priority=20)


def selector_of(model: Any) -> type[Selector] | None:
    """Return the selector of a model's sparse layers; ``None``: the model has none."""
    config = getattr(model, "memory_config", None)
    return None if config is None else config.selector_class


def _logged_meters() -> list[MetersDict]:
    """Return the active aggregators without the one that the trainer opens for a step.

    After each step, the trainer reads all values of that aggregator, for which the host waits.
    fairseq's loops then drop these values. The loops log the values of the outer aggregators, at
    the log interval and at the end of a validation.
    """
    active = metrics.get_active_aggregators()
    in_loop = any(meters is metrics.get_meters(loop) for meters in active for loop in LOOPS)
    return active[:-1] if in_loop else active
