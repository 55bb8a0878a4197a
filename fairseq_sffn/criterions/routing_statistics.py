"""Statistics of routing in fairseq's log: sums of micro-batches, and ratios of the sums."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict

from ..memory import usage


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
    "scored": "routing_tokens_",
    "routed_mass": "routing_mass_",
    "entropy": "routing_entropy_",
    "bias_range": "routing_bias_",
    "passes": "routing_passes_",
}
"""Name of a sum of a layer -> prefix of its key in the logs of a micro-batch."""
RATIOS = {
    "balance_loss": Ratio(_mean, ("weighted_balance", "balance_weight")),
    "load_entropy": Ratio(usage.load_entropy, ("counts",)),
    "load_max": Ratio(usage.load_max, ("counts",)),
    "load_min": Ratio(usage.load_min, ("counts",)),
    "unused_blocks": Ratio(usage.unused_blocks, ("counts",)),
    "memory_usage": Ratio(usage.memory_usage, ("counts",)),
    "load_kl": Ratio(usage.load_kl, ("importance",)),
    "dropped_share": Ratio(usage.dropped_share, ("counts", "dropped")),
    "routed_mass": Ratio(_mean, ("routed_mass", "scored")),
    "gate_entropy": Ratio(_mean, ("entropy", "scored")),
    "bias_range": Ratio(_mean, ("bias_range", "passes")),
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


def logged_meters() -> list[MetersDict]:
    """Return the active aggregators without the one that the trainer opens for a step.

    After each step, the trainer reads all values of that aggregator, for which the host waits.
    fairseq's loops then drop these values. The loops log the values of the outer aggregators, at
    the log interval and at the end of a validation.
    """
    active = metrics.get_active_aggregators()
    in_loop = any(meters is metrics.get_meters(loop) for meters in active for loop in LOOPS)
    return active[:-1] if in_loop else active
