"""The options of sparse models, and the memory that they ask for."""

import copy
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import II

from ..errors import UsageError, flag
from ..memory import ConfigError, MemoryConfig, Selector
from ..memory.compute import ENGINES
from ..memory.gate import GATES
from ..memory.sparse_memory import check_sharding
from .size import check_selector_size


@dataclass
class FollowingOptions(FairseqDataclass):
    """Goes before other options of a model, some of which default to another one's value."""

    @classmethod
    def from_namespace(cls, args: Any) -> Any:
        """Like fairseq's, but resolve references such as ``${model.decoder_embed_dim}``, and read
        the numbers that fairseq's parser leaves as text because their default is a reference.

        Raises:
            UsageError: a number is none.
        """
        config = super().from_namespace(args)
        for option in fields(config):
            value = getattr(config, option.name)
            while reference := re.fullmatch(r"\$\{model\.(\w+)\}", str(value)):
                value = getattr(config, reference[1])
            is_text = isinstance(value, str) and not value.startswith("${")
            if is_text and option.type in (int, Optional[int]):
                try:
                    value = int(value)
                except ValueError as error:
                    shown = f"{flag(option.name)} {value}"
                    raise UsageError(f"{shown}: must be a whole number") from error
            setattr(config, option.name, value)
        return config


@dataclass
class DenseConfig(FollowingOptions, TransformerLanguageModelConfig):
    """fairseq's Transformer language model, with widths that follow ``decoder_embed_dim`` and
    pre-norm layers, as fairseq's own architectures set them."""

    decoder_input_dim: int = field(
        default=II("model.decoder_embed_dim"),
        metadata={"help": "decoder input dimension (default: --decoder-embed-dim)"},
    )
    decoder_output_dim: int = field(
        default=II("model.decoder_embed_dim"),
        metadata={"help": "decoder output dimension (default: --decoder-embed-dim)"},
    )
    decoder_normalize_before: bool = field(
        default=True, metadata={"help": "apply layernorm before each decoder block"}
    )


def _flat_fields(config: type, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The fields of a nested config under the names of their flags: ``decoder.layers`` is
    ``decoder_layers``."""
    result = []
    for option in fields(config):
        name = prefix + option.name
        if isinstance(option.type, type) and issubclass(option.type, FairseqDataclass):
            result += _flat_fields(option.type, f"{name}_")
        elif option.name != "_name":
            result.append((name, option.type, copy.copy(option)))  # a field knows its name
    return result


@dataclass
class TranslationConfig(
    make_dataclass(
        "FlatTransformerConfig", _flat_fields(TransformerConfig), bases=(FollowingOptions,)
    )
):
    """fairseq's encoder-decoder Transformer, whose own config is nested and unregistered. A
    decoder is as wide as its encoder unless told otherwise, as in fairseq's architectures."""

    decoder_embed_dim: int = field(
        default=II("model.encoder_embed_dim"),
        metadata={"help": "decoder embedding dimension (default: --encoder-embed-dim)"},
    )
    decoder_ffn_embed_dim: int = field(
        default=II("model.encoder_ffn_embed_dim"),
        metadata={"help": "decoder FFN width (default: --encoder-ffn-embed-dim)"},
    )
    decoder_input_dim: int = field(
        default=II("model.decoder_embed_dim"),
        metadata={"help": "decoder input dimension (default: --decoder-embed-dim)"},
    )
    decoder_output_dim: int = field(
        default=II("model.decoder_embed_dim"),
        metadata={"help": "decoder output dimension (default: --decoder-embed-dim)"},
    )
    encoder_layers_to_keep: Optional[str] = field(
        default=None, metadata={"help": "which layers to keep when pruning, such as 0,2,4"}
    )
    decoder_layers_to_keep: Optional[str] = field(
        default=None, metadata={"help": "which layers to keep when pruning, such as 0,2,4"}
    )


@dataclass
class SparseOptions(FairseqDataclass):
    """Flags that define the sparse layers; ``None`` leaves the choice to the selector."""

    sffn_selector: Optional[ChoiceEnum(sorted(Selector.registry))] = field(
        default=None, metadata={"help": "how the blocks of a token are selected"}
    )
    sffn_gate: Optional[ChoiceEnum(list(GATES))] = field(
        default=None,
        metadata={"help": "weight of a selected block (default: the selector's own)"},
    )
    sffn_expansion: int = field(
        default=16,
        metadata={"help": "memory cells of a sparse layer, in multiples of the FFN width"},
    )
    sffn_block_size: Optional[int] = field(
        default=None,
        metadata={"help": "memory cells per block (default: the selector's own)"},
    )
    sffn_active_blocks: Optional[int] = field(
        default=None,
        metadata={
            "help": "blocks that a token uses (default: FFN width / block size, so that a sparse "
            "layer costs what a dense one costs)"
        },
    )
    sffn_freq: int = field(
        default=2, metadata={"help": "layer i is sparse if (i + 1) is a multiple of this"}
    )
    sffn_capacity_factor: float = field(
        default=0.0,
        metadata={
            "help": "in training, a block takes at most this many times its fair share of tokens "
            "and drops the rest (default: 0, nothing is dropped)"
        },
    )
    sffn_eval_capacity_factor: float = field(
        default=0.0, metadata={"help": "the same in evaluation (default: 0, nothing is dropped)"}
    )
    sffn_init_scale: float = field(
        default=1.0,
        metadata={
            "help": "multiplies the initial tables, which are scaled as a dense FFN of the active "
            "size: by the fan-in of the active cells, not of all cells"
        },
    )
    sffn_value_lr_scale: float = field(
        default=1.0,
        metadata={
            "help": "the learning rate of the value tables, in multiples of the others' (with an "
            "optimizer that is blind to the scale of gradients, such as adam)"
        },
    )
    sffn_expert_parallel: int = field(
        default=1,
        metadata={
            "help": "processes over which the blocks of each sparse layer are shared out; divides "
            "the number of processes, the rest of which are replicas (default: 1, every process "
            "has all blocks)"
        },
    )
    sffn_engine: Optional[ChoiceEnum(list(ENGINES))] = field(
        default=None,
        metadata={"help": "for debugging: force how blocks are multiplied (same results)"},
    )


def selector_flags(selector: type[Selector]) -> dict[str, str]:
    """Name of the model option -> name of the selector's own option."""
    prefix = selector.flag_prefix.replace("-", "_")
    return {f"{prefix}_{option.name}": option.name for option in fields(selector.Config)}


def _selector_fields() -> list[tuple[str, Any, Any]]:
    """Every selector's options, each ``None``: not asked for."""
    options: list[tuple[str, Any, Any]] = []
    for _, selector in sorted(Selector.registry.items()):
        types = typing.get_type_hints(selector.Config)
        metadata = {option.name: option.metadata for option in fields(selector.Config)}
        for option, own in selector_flags(selector).items():
            kind = types[own]
            if typing.get_origin(kind) is typing.Literal:
                kind = ChoiceEnum(list(typing.get_args(kind)))
            help = f"{selector.name}: {metadata[own]['help']}"
            options.append((option, Optional[kind], field(default=None, metadata={"help": help})))
    return options


def sparse(name: str, base: type[FairseqDataclass]) -> type[FairseqDataclass]:
    """``base`` with :class:`SparseOptions` and every selector's options."""
    return make_dataclass(name, _selector_fields(), bases=(base, SparseOptions))


def check_supported(args: Any, sides: Sequence[str]) -> None:
    """Refuse options of fairseq's layers that a sparse FFN cannot honour.

    Args:
        args: the model's options.
        sides: of ``encoder`` and ``decoder``, what the model has.
    """
    refused = {
        "scale_fc": "normalises the hidden units of a dense FFN, of which a sparse one has none",
        "quant_noise_pq": "quantization noise does not reach the tables of a sparse FFN",
        "quant_noise_scalar": "quantization noise does not reach the tables of a sparse FFN",
        "base_layers": "fairseq's BASE layers cannot be mixed with sparse FFNs",
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
        if not 1 <= args.sffn_freq <= layers:
            raise UsageError(f"--sffn-freq {args.sffn_freq}: must be 1 to --{side}-layers {layers}")


def build_memory_config(
    args: Any, vocab_size: int, token_counts: Sequence[int] | None, side: str = "decoder"
) -> MemoryConfig:
    """The memory of one sparse layer.

    Args:
        args: the model's options, with ``sffn_selector`` set.
        vocab_size: token ids in the dictionary.
        token_counts: how often each occurs in the training data.
        side: ``encoder`` or ``decoder``.

    Raises:
        UsageError: names the flag and the value that cannot be honoured.
    """
    selector = Selector.registry[str(args.sffn_selector)]
    width = getattr(args, f"{side}_ffn_embed_dim")
    if args.sffn_expansion < 1:
        raise UsageError(f"--sffn-expansion {args.sffn_expansion}: must be at least 1")
    block_size, given = args.sffn_block_size, args.sffn_block_size is not None
    if not given:
        block_size = selector.default_block_size(width)
    if block_size < 1:
        raise UsageError(f"--sffn-block-size {block_size}: must be at least 1")
    active_blocks = args.sffn_active_blocks
    if active_blocks is None:
        active_blocks, remainder = divmod(width, block_size)
        if remainder or not active_blocks:
            default = "" if given else f"the default of {selector.name}, "
            raise UsageError(
                f"--sffn-block-size {block_size}: {default}does not divide --{side}-ffn-embed-dim "
                f"{width}; choose one that does, or set --sffn-active-blocks"
            )

    fields_of_ours = ("block_size", "active_blocks", "selector", "gate", "engine", "init_scale")
    fields_of_ours += ("value_lr_scale", "capacity_factor", "eval_capacity_factor")
    names = {name: f"sffn_{name}" for name in fields_of_ours}
    names |= {"embed_dim": f"{side}_embed_dim", "activation": "activation_fn"}
    names |= {own: option for option, own in selector_flags(selector).items()}
    # fairseq's older name of the option is its fallback.
    dropout = "activation_dropout" if args.activation_dropout else "relu_dropout"
    names["activation_dropout"] = dropout
    names |= {"shards": "sffn_expert_parallel"}
    try:
        config = MemoryConfig(
            embed_dim=getattr(args, f"{side}_embed_dim"),
            num_cells=args.sffn_expansion * width,
            block_size=block_size,
            active_blocks=active_blocks,
            selector=_selector_options(args, selector),
            gate=None if args.sffn_gate is None else str(args.sffn_gate),
            activation=utils.get_activation_fn(str(args.activation_fn)),
            vocab_size=vocab_size,
            token_counts=token_counts,
            activation_dropout=getattr(args, dropout) or 0.0,
            capacity_factor=args.sffn_capacity_factor,
            eval_capacity_factor=args.sffn_eval_capacity_factor,
            init_scale=args.sffn_init_scale,
            value_lr_scale=args.sffn_value_lr_scale,
            engine=None if args.sffn_engine is None else str(args.sffn_engine),
        )
        check_sharding(config, args.sffn_expert_parallel)
    except ConfigError as error:
        # A number of the data, such as the types of the dictionary, has no flag.
        name = flag(names[error.field]) if error.field in names else error.field.replace("_", " ")
        if error.field == "active_blocks" and args.sffn_active_blocks is None:
            blocks = (
                f"{active_blocks} active blocks, as many as make --{side}-ffn-embed-dim {width}"
            )
            raise UsageError(
                f"--sffn-block-size {block_size}: needs {blocks}, but {error.reason}"
            ) from error
        raise UsageError(f"{name} {error.value}: {error.reason}") from error
    own = {option: getattr(args, option, None) for option in selector_flags(selector)}
    check_selector_size(config, {name: size for name, size in own.items() if type(size) is int})
    return config


def _selector_options(args: Any, selector: type[Selector]) -> Any:
    options = {}
    for other in Selector.registry.values():
        for option, own in selector_flags(other).items():
            value = getattr(args, option, None)
            if value is None:
                continue
            if other is not selector:
                raise UsageError(
                    f"{flag(option)} {value}: is for the selector {other.name}, "
                    f"but this model selects by {selector.name}"
                )
            # fairseq's choices are enums; the memory knows plain strings.
            plain = isinstance(value, (bool, int, float))
            options[own] = value if plain else str(value)
    return selector.Config(**options)
