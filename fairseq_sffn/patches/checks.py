"""Checks of model, criterion and options together, before training starts."""

from __future__ import annotations

import logging
from typing import Any

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion

from ..criterions.routing_losses import RoutingLosses
from ..errors import UsageError
from ..memory import MemoryConfig, gate
from ..models.plugin_model import PluginModel

logger = logging.getLogger(__name__)

SCALE_DEPENDENT = ("sgd", "nag", "lamb", "adafactor --scale-parameter")
"""Optimizers whose steps depend on the scale of gradients or of parameters."""


def check_options(cfg: Any, model: PluginModel) -> None:
    """Refuse options of fairseq with which training would give a useless model.

    Args:
        cfg: configuration of the training.
        model: the model.

    Raises:
        UsageError: such an option is set.
    """
    path = cfg.common.quantization_config_path
    if path and model.memory_configs:
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
    check_value_lr_scale(cfg.optimizer, model)


def check_value_lr_scale(options: Any, model: PluginModel) -> None:
    """Refuse ``--sffn-value-lr-scale`` with an optimizer that does not follow it.

    A value table is stored divided by the factor, so its gradients are multiplied by it. A step
    that does not depend on the scale of gradients then changes the values by the factor. SGD's
    step grows with the gradients. A step in proportion to the norm of the table cancels the factor.

    Args:
        options: options of the optimizer; ``None``: unknown.
        model: the model.

    Raises:
        UsageError: the optimizer is one of these.
    """
    name = str(getattr(options, "_name", None) or "")
    if name == "adafactor" and getattr(options, "scale_parameter", False):
        name += " --scale-parameter"
    for config in model.memory_configs.values():
        if config.value_lr_scale != 1 and name in SCALE_DEPENDENT:
            raise UsageError(
                f"--sffn-value-lr-scale {config.value_lr_scale}: not with --optimizer {name}; it "
                "needs steps that do not depend on the scale of gradients and tables, as Adam's"
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
    has_losses = isinstance(criterion, RoutingLosses)
    weights = criterion.weights(model.memory_configs).values() if has_losses else ()
    for layer, config in model.memory_configs.items():
        selector = config.selector_class
        weighs = any(layer in weight_of for weight_of in weights)
        learns = gate.learns(config.gate_name, config.routed.active_blocks)
        if not weighs and not learns and has_router(config):
            losses = "--balance-loss-weight"
            losses += " and --criterion sffn_cross_entropy" * (not has_losses)
            remedy = f", or add {losses}" if selector.selects_by_scores else ""
            why = ""
            if config.gate_name != "none":
                shared = f" beside --sffn-shared-blocks {config.shared_blocks}"
                why = f", as a token's only block{shared * bool(config.shared_blocks)} weighs 1"
            raise UsageError(
                f"--sffn-gate {config.gate_name}: leaves the router of {selector.name} without a "
                f"gradient where no balance loss has a weight{why}; choose another gate{remedy}"
            )
    selectors = dict.fromkeys(config.selector_class for config in model.memory_configs.values())
    for selector in selectors:
        if not has_losses and selector.default_balance_weight:
            logger.warning(
                f"--criterion {name}: trains {selector.name} without its balance loss; "
                "sffn_cross_entropy has it"
            )


def has_router(config: MemoryConfig) -> bool:
    """Return whether a memory has parameters that only select blocks."""
    selector = config.selector_class
    return selector.key_table == "full" and config.selection_params() > 0
