"""Checks of a memory's configuration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from .activations import ACTIVATIONS, GATED
from .compute import ENGINES, NATIVE
from .gate import GATES
from .selection import Selection, Selector, SelectorConfig

if TYPE_CHECKING:
    from .config import MemoryConfig

FRACTIONS = (
    *("capacity_factor", "eval_capacity_factor", "activation_dropout", "balance_rate"),
    *("init_scale", "value_lr_scale"),
)
"""Fields that are numbers, whole or not."""

TYPE_REASONS = {bool: "neither True nor False", int: "not a whole number", float: "not a number"}
"""Type of a selector's option -> the reason to refuse a value of another type."""


class ConfigError(ValueError):
    """A field of :class:`MemoryConfig` or of a selector's options is not supported.

    The message has field, value and reason in one line.

    Attributes:
        field: name of the field.
        value: its value.
        reason: why it is refused.
    """

    def __init__(self, field: str, value: object, reason: str):
        super().__init__(f"{field} {value}: {reason}")
        self.field, self.value, self.reason = field, value, reason


def check_config(config: MemoryConfig) -> None:
    """Raise ConfigError if a field is out of range or contradicts another one."""
    for name in ("embed_dim", "num_cells", "block_size", "active_blocks"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(name, value, "is not a whole number")
        if value < 1:
            raise ConfigError(name, value, "must be at least 1")
    if config.num_cells % config.block_size:
        reason = f"does not divide the {config.num_cells} cells of the memory"
        raise ConfigError("block_size", config.block_size, reason)
    if config.active_blocks > config.num_blocks:
        reason = (
            f"is more than the {config.num_blocks} blocks that "
            f"{config.num_cells} cells in blocks of {config.block_size} make"
        )
        raise ConfigError("active_blocks", config.active_blocks, reason)
    _check_shared_blocks(config)
    if not isinstance(config.selector, (str, SelectorConfig)):
        raise ConfigError("selector", config.selector, "is no name and no selector's Config")
    if type(config.selector) is SelectorConfig:
        raise ConfigError("selector", config.selector, "is the Config of no selector")
    if isinstance(config.selector, str) and config.selector not in Selector.registry:
        known = ", ".join(sorted(Selector.registry))
        raise ConfigError("selector", config.selector, f"is none of {known}")
    if config.gate is not None and config.gate not in GATES:
        raise ConfigError("gate", config.gate, f"is none of {', '.join(GATES)}")
    if config.gate_name != "none" and not config.selector_class.scores_blocks:
        reason = f"{config.selector_class.name} gives blocks no score to weigh them by; use none"
        raise ConfigError("gate", config.gate, reason)
    if config.gate_name == "none" and config.route_scale != 1:
        reason = "is a factor of the weights of a gate, and the gate is none"
        raise ConfigError("route_scale", config.route_scale, reason)
    if not isinstance(config.activation, str) and not callable(config.activation):
        raise ConfigError("activation", config.activation, "is no name and no function")
    if isinstance(config.activation, str) and config.activation not in ACTIVATIONS:
        raise ConfigError("activation", config.activation, f"is none of {', '.join(ACTIVATIONS)}")
    if config.glu is not None and config.glu not in GATED:
        raise ConfigError("glu", config.glu, f"is none of {', '.join(GATED)}")
    if config.glu is not None and config.selector_class.key_table != "full":
        reason = f"{config.selector_class.name} computes no cells from a key table, to gate them"
        raise ConfigError("glu", config.glu, reason)
    if config.context_tokens and config.vocab_size is None:
        reason = f"{config.selector_class.name} looks at token ids and needs to know how many"
        raise ConfigError("vocab_size", None, reason)
    if config.vocab_size is not None and config.vocab_size < 1:
        raise ConfigError("vocab_size", config.vocab_size, "must be at least 1")
    for name in FRACTIONS:
        if type(getattr(config, name)) not in (float, int):
            raise ConfigError(name, getattr(config, name), TYPE_REASONS[float])
    for name in ("capacity_factor", "eval_capacity_factor"):
        if not 0 <= getattr(config, name) < math.inf:
            reason = "must be positive and finite, or 0 for dropless"
            raise ConfigError(name, getattr(config, name), reason)
    if not 0 <= config.activation_dropout < 1:
        reason = "must be at least 0 and below 1"
        raise ConfigError("activation_dropout", config.activation_dropout, reason)
    if not 0 <= config.balance_rate < math.inf:
        reason = "must not be negative, infinite or NaN"
        raise ConfigError("balance_rate", config.balance_rate, reason)
    selector = config.selector_class
    if config.balance_rate and not (selector.scores_blocks and selector.selects_by_scores):
        reason = f"{selector.name} selects by no score that a bias could change"
        raise ConfigError("balance_rate", config.balance_rate, reason)
    if config.engine is not None:
        if config.engine not in ENGINES:
            raise ConfigError("engine", config.engine, f"is none of {', '.join(ENGINES)}")
        shape = (config.num_blocks, config.block_size, config.embed_dim)
        if not ENGINES[config.engine].supports("cpu", torch.float32, shape):
            reason = f"cannot multiply blocks of {config.block_size} x {config.embed_dim}"
            if config.engine in NATIVE:
                reason = "has no C++ kernels here: no compiler, or FAIRSEQ_SFFN_KERNELS=off"
            raise ConfigError("engine", config.engine, reason)
    for name in ("init_scale", "value_lr_scale", "route_scale"):
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(name, getattr(config, name), "must be positive and finite")
    if not isinstance(config.bias, bool):
        raise ConfigError("bias", config.bias, "is neither True nor False")
    for name, kind in config.selector_options.plain_types().items():
        value = getattr(config.selector_options, name)
        if type(value) not in (kind, int if kind is float else kind):
            raise ConfigError(name, value, f"is {TYPE_REASONS[kind]}")
    for name, choices in config.selector_options.choices().items():
        if (value := getattr(config.selector_options, name)) not in choices:
            raise ConfigError(name, value, f"is none of {', '.join(choices)}")
    if not config.shared_blocks:
        config.selector_class.validate(config)
    elif config.routed_blocks:
        try:
            _ = config.routed
        except ConfigError as error:
            reason = f"{error.reason} (beside shared_blocks {config.shared_blocks})"
            raise ConfigError(error.field, error.value, reason) from error


def _check_shared_blocks(config: MemoryConfig) -> None:
    shared, active = config.shared_blocks, config.active_blocks
    if not isinstance(shared, int) or isinstance(shared, bool):
        raise ConfigError("shared_blocks", shared, "is not a whole number")
    if shared < 0:
        raise ConfigError("shared_blocks", shared, "must not be negative")
    if shared > active:
        raise ConfigError("shared_blocks", shared, f"is more than the {active} active blocks")
    if shared == active < config.num_blocks:
        reason = (
            f"leaves none of the {active} active blocks to the other {config.routed_blocks} blocks"
        )
        raise ConfigError("shared_blocks", shared, reason)


def check_selector(config: MemoryConfig, selector: nn.Module) -> None:
    """Raise ConfigError if ``Selector.num_params`` does not tell the size of a selector.

    Args:
        config: of the memory.
        selector: the selector of its routed blocks. Its parameters may be on the meta device.
    """
    trained = sum(each.numel() for each in selector.parameters() if each.requires_grad)
    if (declared := config.selection_params()) != trained:
        reason = f"has {trained:,} trained parameters, but its num_params returns {declared:,}"
        raise ConfigError("selector", config.selector_class.name, reason)


def check_selection(
    config: MemoryConfig, selection: Selection, needs_scores: bool, shards: int
) -> None:
    """Raise ConfigError if a selector did not return what the memory needs.

    Args:
        config: of the memory.
        selection: what the selector returned.
        needs_scores: whether the gate, the losses or the balancer read its scores.
        shards: number of ranks over which the blocks are sharded.
    """
    name, scores, blocks = config.selector_class.name, selection.scores, config.routed_blocks
    if selection.blocks.dtype != torch.int64:
        reason = f"returned blocks of dtype {selection.blocks.dtype}; must be torch.int64"
        raise ConfigError("selector", name, reason)
    if scores is None and needs_scores and config.selector_class.scores_blocks:
        reason = "returned no scores, which gates and losses need, and its scores_blocks is True"
        raise ConfigError("selector", name, reason)
    if scores is not None and scores.num_blocks != blocks:
        reason = (
            f"{name} scores {scores.num_blocks} of {blocks} blocks: a rank has the keys of its own "
            "blocks, so the selector has to gather what it computes of them (SelectorInput.gather)"
        )
        raise ConfigError("shards", shards, reason)
