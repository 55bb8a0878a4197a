"""Label-smoothed cross entropy with the balance and z losses of sparse layers."""

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from .routing_losses import RoutingLossConfig, RoutingLosses


@dataclass
class SFFNLabelSmoothedCrossEntropyConfig(
    RoutingLossConfig, LabelSmoothedCrossEntropyCriterionConfig
):
    pass


@register_criterion(
    "sffn_label_smoothed_cross_entropy", dataclass=SFFNLabelSmoothedCrossEntropyConfig
)
class SFFNLabelSmoothedCrossEntropyCriterion(RoutingLosses, LabelSmoothedCrossEntropyCriterion):
    """fairseq's label-smoothed cross entropy + weight * balance loss + weight * z loss."""

    def __init__(self, cfg: SFFNLabelSmoothedCrossEntropyConfig, task: Any) -> None:
        super().__init__(
            cfg,
            task,
            cfg.sentence_avg,
            cfg.label_smoothing,
            cfg.ignore_prefix_size,
            cfg.report_accuracy,
        )
