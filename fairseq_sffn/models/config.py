"""Options of the plugin's models. fairseq makes flags from them."""

import copy
import re
import typing
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import II

from ..errors import UsageError, flag
from ..memory import Selector
from ..memory.activations import GATED
from ..memory.compute import ENGINES
from ..memory.gate import GATES


@dataclass
class FollowingOptions(FairseqDataclass):
    """Base class to put before a model's options.

    The default of an option may be a reference to another option.
    """

    @classmethod
    def from_namespace(cls, args: Any) -> Any:
        """Return the options of a namespace, as fairseq does, with references resolved.

        An example of a reference is ``${model.decoder_embed_dim}``. If the default is a reference,
        fairseq's parser leaves a number as text. This function converts it.

        Raises:
            UsageError: an option that must be a number is not a number.
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
class GatedOptions(FairseqDataclass):
    """Options of gated feed-forward networks, in dense and sparse layers."""

    sffn_glu: Optional[ChoiceEnum(list(GATED))] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "gated FFNs in all layers, dense and sparse: hidden units and memory cells are "
            "f(x . k) * (x . u), with this f in place of --activation-fn and a third table or "
            "matrix of all u; for selectors that use the memory's key table (default: none)"
        },
    )
    sffn_glu_width: Optional[int] = field(
        default=None,
        metadata={
            "help": "width of gated FFNs. It takes the place of the FFN width: for dense layers, "
            "memory cells and active blocks. By default, a gated FFN has about as many parameters "
            "as a plain one (default: 2/3 of the FFN width, to the nearest multiple of 64, at "
            "least 64)"
        },
    )


@dataclass
class DenseConfig(FollowingOptions, GatedOptions, TransformerLanguageModelConfig):
    """Options of fairseq's Transformer language model.

    Input and output widths default to ``decoder_embed_dim``, as in fairseq's own architectures.
    Layers are pre-norm by default.
    """

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
    """Return (name, type, field) of each option of a nested config.

    The name of ``decoder.layers`` is ``decoder_layers``, like its flag.
    """
    result = []
    for option in fields(config):
        name = prefix + option.name
        if isinstance(option.type, type) and issubclass(option.type, FairseqDataclass):
            result += _flat_fields(option.type, f"{name}_")
        elif option.name != "_name":
            result.append((name, option.type, copy.copy(option)))  # a field stores its name
    return result


@dataclass
class TranslationConfig(
    make_dataclass(  # type: ignore[misc]
        "FlatTransformerConfig", _flat_fields(TransformerConfig), bases=(FollowingOptions,)
    ),
    GatedOptions,
):
    """Options of fairseq's encoder-decoder Transformer.

    fairseq's own config is nested and not registered. A decoder is by default as wide as its
    encoder, as in fairseq's architectures.
    """

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
    """Options of the sparse layers. ``None`` is the selector's own default."""

    sffn_selector: Optional[ChoiceEnum(sorted(Selector.registry))] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "selection method; required by transformer_lm_sffn and transformer_sffn unless "
            "there are --sffn-layers, fixed by all other models"
        },
    )
    sffn_gate: Optional[ChoiceEnum(list(GATES))] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "weight of a selected block: 'none' (1), 'softmax' (its probability among all "
            "blocks), 'renormalized' (its probability among the selected blocks), 'sigmoid' or "
            "'sqrt_softplus' of its score, or 'sigmoid_renormalized' or "
            "'sqrt_softplus_renormalized' (divided by the sum over the selected blocks). With "
            "'none', only the balance loss trains a learned router or query network, so its weight "
            "must be above 0 (default: the selector's own)"
        },
    )
    sffn_route_scale: float = field(
        default=1.0, metadata={"help": "factor of the weights of any gate but 'none'"}
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
            "help": "blocks that each token uses; by default, a sparse layer costs as much as a "
            "dense one (default: FFN width / block size)"
        },
    )
    sffn_shared_blocks: int = field(
        default=0,
        metadata={
            "help": "of the active blocks, the number that every token uses, with weight 1; the "
            "others are selected among the remaining blocks, and only these count in usage and "
            "balance loss"
        },
    )
    sffn_freq: int = field(
        default=2, metadata={"help": "layer i (from 0) is sparse if (i + 1) is a multiple of this"}
    )
    sffn_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "layer plan in place of --sffn-freq, as SELECTOR[/OPTION=VALUE...]:LAYERS, "
            "separated by commas, such as hash_layer:0-2,avgk/block_size=64:3-. LAYERS, from 0, is "
            "a layer (3), a range (0-2) or all up to the last layer (3-). Other layers are dense, "
            "as are those of the selector 'dense'. OPTION is block_size, active_blocks, "
            "shared_blocks, expansion, balance_rate, route_scale or gate, in place of the flag "
            "--sffn-OPTION. The plan holds for the encoder and the decoder. transformer_lm_sffn "
            "and transformer_sffn take every selector, all other models their own"
        },
    )
    sffn_capacity_factor: float = field(
        default=0.0,
        metadata={
            "help": "in training, a block takes at most this many times its even share of the "
            "tokens and drops the rest; 0 drops nothing"
        },
    )
    sffn_eval_capacity_factor: float = field(
        default=0.0, metadata={"help": "the capacity factor in evaluation; 0 drops nothing"}
    )
    sffn_balance_rate: float = field(
        default=0.0,
        metadata={
            "help": "loss-free balancing (Wang et al. 2024, arXiv 2408.15664): after each update, "
            "the bias of a block, used for selection alone, moves by this much: up if the block's "
            "load is below the mean, down if above. The unit is that of the gate's scores, such as "
            "0.001; without a gate, it is the standard deviation of the logits. 0 turns it off. "
            "The models transformer_lm_moe have 0.001 by default; --sffn-selector moe and layer "
            "plans do not"
        },
    )
    avgk_balance_rate: Optional[float] = field(
        default=None, metadata={"help": "earlier name of --sffn-balance-rate; refused"}
    )
    sffn_init_scale: float = field(
        default=1.0,
        metadata={
            "help": "factor of the initial tables, which are scaled like a dense FFN of the "
            "active size: by the fan-in of the active cells, not of all cells"
        },
    )
    sffn_value_lr_scale: float = field(
        default=1.0,
        metadata={
            "help": "learning rate of the value tables, in multiples of the learning rate; needs "
            "an optimizer that ignores the scale of gradients and tables, such as Adam (not sgd, "
            "nag, lamb, or adafactor with --scale-parameter)"
        },
    )
    sffn_expert_parallel: int = field(
        default=1,
        metadata={
            "help": "processes over which the blocks of each sparse layer are sharded (expert "
            "parallelism); must divide the number of processes and the number of blocks; with 1, "
            "every process has all blocks"
        },
    )
    sffn_engine: Optional[ChoiceEnum(list(ENGINES))] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "for debugging: how blocks are computed, with the same results. 'loop': one "
            "matrix product per block; 'grouped': PyTorch's grouped_mm; 'embedding_bag': embedding "
            "bags of table rows; 'masked': products with the whole table; 'tiled': tiles of "
            "assignments, as on GPUs; 'native_loop' and 'native_embedding_bag': C++ kernels "
            "(default: by the sizes)"
        },
    )


def selector_flags(selector: type[Selector]) -> dict[str, str]:
    """Return the options of a selector: name of the model's option -> name in the ``Config``."""
    prefix = selector.flag_prefix.replace("-", "_")
    return {f"{prefix}_{option.name}": option.name for option in fields(selector.Config)}


def _selector_fields() -> list[tuple[str, Any, Any]]:
    """Return (name, type, field) of the options of all selectors. The defaults are ``None``."""
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
    """Return a dataclass with the options of ``base``, :class:`SparseOptions` and all selectors."""
    return make_dataclass(name, _selector_fields(), bases=(base, SparseOptions))
