"""Build the memory configs of sparse layers from the options of a model."""

import re
from collections.abc import Sequence
from typing import Any

from fairseq import utils

from ..errors import UsageError, flag
from ..memory import ConfigError, MemoryConfig, Selector
from ..memory.sharding import check_sharding
from .config import selector_flags
from .gated import ffn_width
from .layer_plan import layer_groups
from .size import check_selector_size

SFFN_FIELDS = (
    *("block_size", "active_blocks", "selector", "gate", "engine", "init_scale"),
    *("value_lr_scale", "capacity_factor", "eval_capacity_factor", "balance_rate", "route_scale"),
    *("glu", "shared_blocks"),
)
"""Fields of a memory's config that the options ``sffn_`` + field name set."""


def check_supported(args: Any, sides: Sequence[str]) -> None:
    """Refuse options of fairseq's layers that a sparse FFN does not support.

    Args:
        args: the model's options.
        sides: ``encoder``, ``decoder`` or both.

    Raises:
        UsageError: an option is not supported. The message names the flag, the value and the
            reason.
    """
    refused = {
        "scale_fc": "normalises the hidden units of a dense FFN, of which a sparse one has none",
        "quant_noise_pq": "quantization noise does not reach the tables of a sparse FFN",
        "quant_noise_scalar": "quantization noise does not reach the tables of a sparse FFN",
        "base_layers": "fairseq's BASE layers cannot be mixed with sparse FFNs",
        "avgk_balance_rate": "is --sffn-balance-rate today, for every selector that scores blocks",
    }
    for name, reason in refused.items():
        if value := getattr(args, name, None):
            shown = flag(name) if value is True else f"{flag(name)} {value}"
            raise UsageError(f"{shown}: {reason}")
    for side in sides:
        kept = getattr(args, f"{side}_layers_to_keep") or ""
        if not re.fullmatch(r"(\d+(,\d+)*)?", kept):
            raise UsageError(
                f"--{side}-layers-to-keep {kept}: is not a list of layers such as 0,2,4"
            )
        layers = getattr(args, f"{side}_layers")
        numbers = [int(number) for number in kept.split(",")] if kept else []
        if len(set(numbers)) < len(numbers) or max(numbers, default=0) >= layers:
            raise UsageError(
                f"--{side}-layers-to-keep {kept}: must be different ones of 0 to {layers - 1}"
            )
        if args.sffn_layers is None and not 1 <= args.sffn_freq <= layers:
            raise UsageError(f"--sffn-freq {args.sffn_freq}: must be 1 to --{side}-layers {layers}")


def build_memory_configs(
    args: Any, vocab_size: int, token_counts: Sequence[int] | None, side: str = "decoder"
) -> dict[int, MemoryConfig]:
    """Return number of each sparse layer of a side, from 0 -> its memory.

    Args:
        args, vocab_size, token_counts, side: see :func:`build_memory_config`.

    Raises:
        UsageError: an option has a wrong value. The message names the flag, the value and the
            reason.
    """
    configs: dict[int, MemoryConfig] = {}
    groups = layer_groups(args, side)
    _check_selector_options(args, [str(group.options.sffn_selector) for group in groups])
    for group in groups:
        try:
            config = build_memory_config(group.options, vocab_size, token_counts, side)
        except UsageError as error:
            if group.entry is None:
                raise
            raise UsageError(f"--sffn-layers {group.entry}: {error}") from error
        configs |= dict.fromkeys(group.numbers, config)
    return configs


def build_memory_config(
    args: Any, vocab_size: int, token_counts: Sequence[int] | None, side: str = "decoder"
) -> MemoryConfig:
    """Return the memory of sparse layers with the same options.

    Args:
        args: the options of the layers, with ``sffn_selector`` set.
        vocab_size: token ids in the dictionary.
        token_counts: occurrences of each token id in the training data.
        side: ``encoder`` or ``decoder``.

    Raises:
        UsageError: an option has a wrong value. The message names the flag, the value and the
            reason.
    """
    selector = Selector.registry[str(args.sffn_selector)]
    width = ffn_width(args, side)
    if args.sffn_expansion < 1:
        raise UsageError(f"--sffn-expansion {args.sffn_expansion}: must be at least 1")
    block_size, active_blocks = _block_sizes(args, selector, side)
    try:
        config = MemoryConfig(
            embed_dim=getattr(args, f"{side}_embed_dim"),
            num_cells=args.sffn_expansion * width,
            block_size=block_size,
            active_blocks=active_blocks,
            selector=_selector_options(args, selector),
            gate=None if args.sffn_gate is None else str(args.sffn_gate),
            activation=utils.get_activation_fn(str(args.activation_fn)),
            glu=None if args.sffn_glu is None else str(args.sffn_glu),
            vocab_size=vocab_size,
            token_counts=token_counts,
            activation_dropout=getattr(args, _dropout_option(args)) or 0.0,
            capacity_factor=args.sffn_capacity_factor,
            eval_capacity_factor=args.sffn_eval_capacity_factor,
            balance_rate=args.sffn_balance_rate,
            init_scale=args.sffn_init_scale,
            value_lr_scale=args.sffn_value_lr_scale,
            engine=None if args.sffn_engine is None else str(args.sffn_engine),
            route_scale=args.sffn_route_scale,
            shared_blocks=args.sffn_shared_blocks,
        )
        if not config.routed_blocks:
            reason = "shares every block, which makes a dense FFN; use a dense model"
            raise ConfigError("shared_blocks", config.shared_blocks, reason)
        check_sharding(config, args.sffn_expert_parallel)
    except ConfigError as error:
        if error.field == "active_blocks" and args.sffn_active_blocks is None:
            flag_of_width = _flag_of_width(args, side)
            blocks = f"{active_blocks} active blocks, as many as make {flag_of_width} {width}"
            raise UsageError(
                f"--sffn-block-size {block_size}: needs {blocks}, but {error.reason}"
            ) from error
        options = _options_of_fields(args, selector, side)
        # Numbers of the data, such as the size of the dictionary, have no flag.
        name = flag(options[error.field]) if error.field in options else None
        name = name or error.field.replace("_", " ")
        raise UsageError(f"{name} {error.value}: {error.reason}") from error
    own = {option: getattr(args, option, None) for option in selector_flags(selector)}
    check_selector_size(config, {name: size for name, size in own.items() if type(size) is int})
    return config


def _block_sizes(args: Any, selector: type[Selector], side: str) -> tuple[int, int]:
    """Return the cells per block and the active blocks per token."""
    width = ffn_width(args, side)
    block_size, given = args.sffn_block_size, args.sffn_block_size is not None
    if not given:
        block_size = selector.default_block_size(width)
    if block_size < 1:
        raise UsageError(f"--sffn-block-size {block_size}: must be at least 1")
    if args.sffn_active_blocks is not None:
        return block_size, args.sffn_active_blocks
    active_blocks, remainder = divmod(width, block_size)
    if remainder or not active_blocks:
        default = "" if given else f"the default of {selector.name}, "
        raise UsageError(
            f"--sffn-block-size {block_size}: {default}does not divide "
            f"{_flag_of_width(args, side)} {width}; choose one that does, or set "
            "--sffn-active-blocks"
        )
    return block_size, active_blocks


def _flag_of_width(args: Any, side: str) -> str:
    return f"--{side}-ffn-embed-dim" if args.sffn_glu is None else "--sffn-glu-width"


def _dropout_option(args: Any) -> str:
    # fairseq falls back to the older name of the option.
    return "activation_dropout" if args.activation_dropout else "relu_dropout"


def _options_of_fields(args: Any, selector: type[Selector], side: str) -> dict[str, str]:
    """Return field of a memory's config -> option that sets it."""
    return {
        **{name: f"sffn_{name}" for name in SFFN_FIELDS},
        "embed_dim": f"{side}_embed_dim",
        "activation": "activation_fn",
        **{own: option for option, own in selector_flags(selector).items()},
        "activation_dropout": _dropout_option(args),
        "shards": "sffn_expert_parallel",
    }


def _selector_options(args: Any, selector: type[Selector]) -> Any:
    """Return the selector's own config."""
    options = {}
    for option, own in selector_flags(selector).items():
        value = getattr(args, option, None)
        if value is not None:
            # fairseq's choices are enums; the memory takes plain strings.
            plain = isinstance(value, (bool, int, float))
            options[own] = value if plain else str(value)
    return selector.Config(**options)


def _check_selector_options(args: Any, selectors: Sequence[str]) -> None:
    """Refuse options of selectors that no layer has.

    Args:
        args: the model's options.
        selectors: names of the selectors of its layers.

    Raises:
        UsageError: such an option is set.
    """
    for other in Selector.registry.values():
        for option in selector_flags(other):
            value = getattr(args, option, None)
            if value is not None and other.name not in selectors:
                raise UsageError(
                    f"{flag(option)} {value}: is for the selector {other.name}, "
                    f"but this model selects by {' and '.join(dict.fromkeys(selectors))}"
                )
