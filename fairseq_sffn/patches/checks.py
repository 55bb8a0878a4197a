"""Checks of model, criterion and options together, before training starts."""

from __future__ import annotations

import logging
from typing import Any

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion

from ..criterions.routing_losses import RoutingLosses
from ..errors import UsageError
from ..memory import MemoryConfig, SparseMemory
from ..models.plugin_model import PluginModel

logger = logging.getLogger(__name__)


def check_options(cfg: Any, model: PluginModel) -> None:
    """Refuse options of fairseq with which training would give a useless model.

    Args:
        cfg: configuration of the training.
        model: the model.

    Raises:
        UsageError: such an option is set.
    """
    path = cfg.common.quantization_config_path
    if path and hasattr(model, "memory_config"):
        raise UsageError(
            f"--quantization-config-path {path}: quantization does not reach the tables of a "
            "sparse FFN"
        )
    for side in ("encoder", "decoder"):
        if kept := getattr(cfg.model, f"{side}_layers_to_keep", None):
            raise UsageError(
                f"--{side}-layers-to-keep {kept}: is for a trained model, as in --model-overrides "
                f"\"{{'{side}_layers_to_keep': '{kept}'}}\"; a training's checkpoints would be "
                "pruned whenever they are loaded"
            )


def check_criterion(model: PluginModel, criterion: Any, name: str) -> None:
    """Check that a criterion trains all parameters of a model.

    Args:
        model: the model.
        criterion: the criterion.
        name: the criterion's name, for messages.

    Raises:
        UsageError: the criterion cannot train the model, or leaves some parameters without a
            gradient.
    """
    decoder = getattr(model, "decoder", None)
    smoothed = isinstance(criterion, LabelSmoothedCrossEntropyCriterion)
    if smoothed and getattr(decoder, "adaptive_softmax", None) is not None:
        raise UsageError(
            f"--criterion {name}: not with --adaptive-softmax-cutoff; use sffn_cross_entropy"
        )
    config: MemoryConfig | None = getattr(model, "memory_config", None)
    if config is None:  # without sparse layers
        return
    selector, has_losses = config.selector_class, isinstance(criterion, RoutingLosses)
    weighs = has_losses and any(criterion.weights(selector).values())
    if not has_losses and selector.default_balance_weight:
        logger.warning(
            f"--criterion {name}: trains {selector.name} without its balance loss; "
            "sffn_cross_entropy has it"
        )
    if not weighs and not gate_learns(config) and has_router(model):
        losses = "--balance-loss-weight" + " and --criterion sffn_cross_entropy" * (not has_losses)
        raise UsageError(
            f"--sffn-gate {config.gate_name}: leaves the router of {selector.name} without a "
            f"gradient where no balance loss has a weight; choose another gate, or add {losses}"
        )


def gate_learns(config: MemoryConfig) -> bool:
    """Return whether gradients flow through a gate to the scores.

    A single renormalised weight is always 1, so it has no gradient.
    """
    alone = config.gate_name == "renormalized" and config.routed.active_blocks == 1
    return config.gate_name != "none" and not alone


def has_router(model: PluginModel) -> bool:
    """Return whether a model has parameters that only select blocks."""
    return any(
        parameter.requires_grad
        for memory in model.modules()
        if isinstance(memory, SparseMemory) and memory.config.selector_class.key_table == "full"
        for parameter in memory.selector.parameters()
    )
