"""Describe a trained language model of fairseq in plain values, from which a decoder is built."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import UsageError, flag
from ..memory import MemoryConfig
from .decoder import ACTIVATIONS

UNSUPPORTED = {
    "adaptive_softmax_cutoff": "adaptive softmax",
    "adaptive_input": "adaptive input embeddings",
    "character_embeddings": "embeddings of characters",
    "quant_noise_pq": "quantization noise",
    "quant_noise_scalar": "quantization noise",
    "base_layers": "fairseq's BASE layers",
    "decoder_xformers_att_config": "attention of xFormers",
}
"""Option of a model that cannot be exported -> what it turns on."""

MEMORY_FIELDS = (
    *("num_cells", "block_size", "active_blocks", "shared_blocks", "gate", "bias"),
    *("capacity_factor", "balance_rate", "init_scale", "value_lr_scale", "route_scale"),
)
"""Fields of a memory's configuration that an exported model keeps as they are.

The engine depends on the machine. The others are those of the model."""


def check_exportable(options: Any) -> None:
    """Refuse options of a model that :class:`.decoder.Decoder` does not have.

    Args:
        options: the model's options.

    Raises:
        UsageError: the message names the flag, the value and the reason.
    """
    for name, what in UNSUPPORTED.items():
        if value := getattr(options, name, None):
            shown = flag(name) if value is True else f"{flag(name)} {value}"
            raise UsageError(f"{shown}: fairseq-sffn export does not support {what}")
    if (value := str(options.activation_fn)) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UsageError(f"--activation-fn {value}: fairseq-sffn export supports {known}")


def describe(model: Any, options: Any) -> dict[str, Any]:
    """Return the description of a language model, in values that JSON can hold.

    The names of sizes are those of transformers.

    Args:
        model: fairseq's language model.
        options: its options, which :func:`check_exportable` accepts.

    Raises:
        UsageError: the model predicts another number of token ids than it reads.
    """
    decoder = model.decoder
    types, predicted = decoder.embed_tokens.num_embeddings, decoder.output_projection.out_features
    if predicted != types:
        raise UsageError(
            f"--output-dictionary-size {predicted}: fairseq-sffn export needs as many as the "
            f"{types} types of the dictionary"
        )
    configs = getattr(model, "memory_configs", {})
    names = getattr(decoder, "sparse_layers", {})
    gated = getattr(options, "sffn_glu", None)
    dense = [i for i in range(len(decoder.layers)) if i not in names]
    positions = "none"
    if decoder.embed_positions is not None:
        positions = "learned" if options.decoder_learned_pos else "sinusoidal"
    dropout = getattr(options, "activation_dropout", 0.0) or getattr(options, "relu_dropout", 0.0)
    return {
        "vocab_size": types,
        "hidden_size": decoder.embed_dim,
        "input_size": decoder.embed_tokens.embedding_dim,
        "output_size": decoder.output_embed_dim,
        "ffn_size": ffn_size(decoder.layers[dense[0]]) if dense else options.decoder_ffn_embed_dim,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": int(options.decoder_attention_heads),
        "max_position_embeddings": int(decoder.max_target_positions),
        "pad_token_id": int(decoder.padding_idx),
        "positions": positions,
        "embed_scale": float(decoder.embed_scale),
        "embedding_norm": decoder.layernorm_embedding is not None,
        "normalize_before": bool(options.decoder_normalize_before),
        "final_norm": decoder.layer_norm is not None,
        "tied_embeddings": bool(decoder.share_input_output_embed),
        "activation": str(options.activation_fn),
        "glu": None if gated is None else str(gated),
        "scale_attn": bool(getattr(options, "scale_attn", False)),
        "scale_heads": bool(getattr(options, "scale_heads", False)),
        "scale_fc": bool(getattr(options, "scale_fc", False)),
        "scale_resids": bool(getattr(options, "scale_resids", False)),
        "dropout": float(options.dropout),
        "attention_dropout": float(options.attention_dropout),
        "activation_dropout": float(dropout or 0.0),
        "layerdrop": float(options.decoder_layerdrop),
        "memories": {str(i): describe_memory(configs[name]) for i, name in names.items()},
    }


def ffn_size(layer: Any) -> int:
    """Return the hidden units of a dense layer."""
    return int(layer.fc2.in_features)


def describe_memory(config: MemoryConfig) -> dict[str, Any]:
    """Return the fields of a memory's configuration in values that JSON can hold."""
    fields = {name: getattr(config, name) for name in MEMORY_FIELDS}
    return {
        "selector": config.selector_class.name,
        "selector_options": dataclasses.asdict(config.selector_options),
        **fields,
    }


def describe_losses(model: Any, criterion: Any) -> dict[str, Any]:
    """Return the weights of the losses that a trained model's criterion adds to its loss.

    Args:
        model: fairseq's language model.
        criterion: the options of its criterion, or ``None``.
    """

    def option(name: str, default: Any) -> Any:
        value = getattr(criterion, name, None)
        return default if value is None else value

    names = getattr(model.decoder, "sparse_layers", {})
    selectors = {str(i): model.memory_configs[name].selector_class for i, name in names.items()}
    scoring = {i: cls for i, cls in selectors.items() if cls.scores_blocks}
    weights = {
        i: option("balance_loss_weight", cls.default_balance_weight)
        for i, cls in scoring.items()
        if cls.selects_by_scores
    }
    balance = {i: float(weight) for i, weight in weights.items() if weight}
    z = {i: float(option("z_loss_weight", 0.0)) for i in scoring if option("z_loss_weight", 0.0)}
    if str(option("balance_loss_reduce", "sum")) == "mean":
        balance = {i: weight / len(balance) for i, weight in balance.items()}
        z = {i: weight / len(z) for i, weight in z.items()}
    return {
        "balance_loss_weights": balance,
        "z_loss_weights": z,
        "balance_loss_scope": str(option("balance_loss_scope", "micro")),
    }
