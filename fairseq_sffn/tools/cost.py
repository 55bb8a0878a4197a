"""What a model costs: parameters and FLOPs.

FLOPs are those of matrix products, a multiply-add counted as 2.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules import AdaptiveInput
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..errors import UsageError
from ..memory import SparseMemory
from ..models.config import flag

POSITIVE = (
    *("decoder_layers", "decoder_embed_dim", "decoder_attention_heads", "decoder_ffn_embed_dim"),
    *("decoder_input_dim", "decoder_output_dim"),
)
"""Options of a model that are at least 1."""

UNCOUNTED = {
    "adaptive_input": "the cost of adaptive embeddings depends on the token",
    "adaptive_softmax_cutoff": "the cost of an adaptive softmax depends on the token",
    "character_embeddings": "the convolutions of character embeddings are not counted",
    "base_layers": "fairseq's BASE layers are not counted",
}
"""Option of a model -> why its cost is not known."""


@dataclass(frozen=True)
class Cost:
    """What a language model, or a part of it, costs.

    Attributes:
        params: trained parameters, tied ones once.
        active_params: parameters that one token touches, its selectors' and all embeddings
            included.
        flops_per_token: of one forward pass, a multiply-add counted as 2: the matrix products of
            attention (with scores against ``context`` positions), FFNs, vocabulary projection and
            maps between unequal widths, and the selection of blocks.
    """

    params: int = 0
    active_params: int = 0
    flops_per_token: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.active_params + other.active_params,
            self.flops_per_token + other.flops_per_token,
        )


def total(parts: dict[str, Cost]) -> Cost:
    """Cost of all parts."""
    return sum(parts.values(), Cost())


def cost_by_part(model: TransformerLanguageModel, context: int) -> dict[str, Cost]:
    """Cost of the parts of a language model: ``attention``, ``dense_ffn``, ``selection`` of blocks,
    sparse ``memory`` without it, ``vocabulary`` (embedding and projection) and ``other`` (layer
    norms, learned positions, maps between unequal widths).

    Args:
        model: one of ours or fairseq's ``transformer_lm``.
        context: tokens that a token attends to.

    Raises:
        ValueError: the model has adaptive embeddings, whose cost depends on the token.
    """
    decoder = model.decoder
    if isinstance(decoder.embed_tokens, AdaptiveInput) or decoder.adaptive_softmax is not None:
        raise ValueError("the cost of adaptive embeddings depends on the token")
    in_context = Cost(flops_per_token=4 * context * decoder.embed_dim)
    attention = dense_ffn = selection = memory = Cost()
    for layer in decoder.layers:
        attention += _linear_maps(layer.self_attn) + in_context
        if memories := _memories(layer):
            selection += sum(map(_selection, memories), Cost())
            memory += sum(map(_active_cells, memories), Cost())
        else:
            dense_ffn += _linear_maps(layer.fc1, layer.fc2)
    vocabulary = _linear_maps(decoder.embed_tokens, decoder.output_projection)
    parts = {
        "attention": attention,
        "dense_ffn": dense_ffn,
        "selection": selection,
        "memory": memory,
        "vocabulary": vocabulary,
    }
    counted = ("layers", "embed_tokens", "output_projection")
    rest = [child for name, child in decoder.named_children() if name not in counted]
    params = sum(parameter.numel() for parameter in model.parameters()) - total(parts).params
    return parts | {"other": Cost(params, params, _linear_maps(*rest).flops_per_token)}


def _linear_maps(*modules: nn.Module) -> Cost:
    """Cost of modules that compute nothing but linear maps."""
    together = nn.ModuleList(modules)  # counts tied parameters once
    params = sum(parameter.numel() for parameter in together.parameters())
    maps = [module for module in together.modules() if isinstance(module, nn.Linear)]
    return Cost(params, params, sum(2 * linear.weight.numel() for linear in maps))


def _memories(module: nn.Module) -> list[SparseMemory]:
    return [child for child in module.modules() if isinstance(child, SparseMemory)]


def _selection(memory: SparseMemory) -> Cost:
    config = memory.config
    params = config.selector_class.num_params(config)
    return Cost(params, params, config.selection_flops_per_token())


def _active_cells(memory: SparseMemory) -> Cost:
    """Cost of a memory without its selection."""
    config, selection = memory.config, _selection(memory)
    return Cost(
        config.num_params() - selection.params,
        config.active_params() - selection.active_params,
        config.flops_per_token() - selection.flops_per_token,
    )


def model_cost(model: TransformerLanguageModel, context: int) -> Cost:
    """Cost of a language model; see :func:`cost_by_part`."""
    return total(cost_by_part(model, context))


def dense_counterpart(model: TransformerLanguageModel, context: int) -> dict[str, Cost]:
    """Cost of the parts of the same model with a dense FFN of ``decoder_ffn_embed_dim`` in every
    layer; see :func:`cost_by_part`."""
    parts = cost_by_part(model, context)
    width, hidden = model.decoder.embed_dim, model.decoder.cfg.decoder.ffn_embed_dim
    params = 2 * width * hidden + hidden + width
    dense_ffn = sum((Cost(params, params, 4 * width * hidden) for _ in _memories(model)), Cost())
    sparse = {"selection": Cost(), "memory": Cost()}
    return parts | sparse | {"dense_ffn": parts["dense_ffn"] + dense_ffn}


def training_flops_per_token(parts: dict[str, Cost]) -> int:
    """FLOPs to train on a token: three forward passes' for forward and backward, and a fourth of
    the layers, whose activations are recomputed (Narayanan et al. 2021, arXiv 2104.04473,
    appendix)."""
    outside_layers = parts["vocabulary"] + parts["other"]
    return 4 * total(parts).flops_per_token - outside_layers.flops_per_token


def mean_keys_flops(model: TransformerLanguageModel) -> int:
    """FLOPs to form the mean keys of all layers, once a step: an addition for each number in the
    key tables. No part of the costs by token."""
    configs = [m.config for m in _memories(model) if hasattr(m.selector, "mean_keys")]
    return sum(config.num_cells * config.embed_dim for config in configs)


def checkpoint_cost(path: str) -> dict[str, Any]:
    """Cost of the model in a checkpoint, at the context it was trained with, as a dictionary.

    Raises:
        UsageError: the file is no checkpoint, or holds code.
    """
    ensemble, _, task = checkpoint_utils.load_model_ensemble_and_task([path])
    return asdict(model_cost(ensemble[0], task.args.tokens_per_sample))


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``fairseq-sffn cost``; the model's own are left for :func:`run`."""
    parser.add_argument("--arch", required=True, help="a language model, as for fairseq-train")
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        help=f"types in the dictionary, fairseq's {Dictionary().nspecial} special ones included",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=1024,
        help="tokens that a token attends to, and positions of the model: what --tokens-per-sample "
        "is in training (default: 1024, as there)",
    )
    parser.add_argument(
        "--tokens", type=float, help="tokens to train on, such as 60e9, for the FLOPs of training"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = (
        "Every other flag is the model's, such as --decoder-layers 12 --sffn-block-size 256. "
        "Training takes three forward passes, and a fourth of the layers, whose activations are "
        "recomputed. FLOPs are those of matrix products, a multiply-add counted as 2."
    )
    parser.set_defaults(other_flags=[])


def run(args: argparse.Namespace) -> str:
    """What ``fairseq-sffn cost`` prints.

    Raises:
        UsageError: names the flag and the value that cannot be honoured.
    """
    for name in ("vocab_size", "context"):
        if getattr(args, name) < 1:
            raise UsageError(f"{flag(name)} {getattr(args, name)}: must be at least 1")
    special = Dictionary().nspecial
    if args.vocab_size <= special:
        raise UsageError(
            f"--vocab-size {args.vocab_size}: must be at least {special + 1}, "
            f"as {special} types are fairseq's special ones"
        )
    if args.tokens is not None and not 0 < args.tokens < math.inf:
        raise UsageError(f"--tokens {args.tokens}: must be positive and finite")
    model = build_language_model(args.arch, args.vocab_size, args.context, args.other_flags)
    figures = cost_figures(model, args.context, args.tokens)
    asked = {name: getattr(args, name) for name in ("arch", "vocab_size", "context", "tokens")}
    report = asked | figures
    return json.dumps(report, indent=2) if args.json else format_report(report)


def cost_figures(
    model: TransformerLanguageModel, context: int, tokens: float | None
) -> dict[str, Any]:
    """Every figure of a model's cost.

    Args:
        model: a language model.
        context: tokens that a token attends to.
        tokens: that it is trained on; ``None``: not known.

    Returns:
        the fields of :class:`Cost`; ``train_zettaflops``, 1e21 FLOPs, or ``None``;
        ``selection_share`` and ``overhead_vs_dense``, shares of the training FLOPs of the dense
        counterpart; ``mean_keys_flops_per_step``, which is in none of them; ``parts``.
    """
    parts = cost_by_part(model, context)
    training = training_flops_per_token(parts)
    dense = training_flops_per_token(dense_counterpart(model, context))
    selection = 4 * parts["selection"].flops_per_token  # in the layers, so four passes
    return {
        **asdict(total(parts)),
        "train_zettaflops": None if tokens is None else tokens * training / 1e21,
        "selection_share": selection / dense,
        "overhead_vs_dense": (training - dense) / dense,
        "mean_keys_flops_per_step": mean_keys_flops(model),
        "parts": {name: asdict(part) for name, part in parts.items()},
    }


def format_report(report: dict[str, Any]) -> str:
    """A table of the parts, and lines of the other figures."""
    columns = {"params": "parameters", "active_params": "active", "flops_per_token": "FLOPs/token"}
    rows = [["", *columns.values()]]
    for name, part in (*report["parts"].items(), ("total", report)):
        label = name.replace("_", " ").replace("ffn", "FFN")
        rows.append([label, *(f"{part[column]:,}" for column in columns)])
    lines = [
        f"{report['arch']}: {report['vocab_size']:,} types, context {report['context']:,}",
        "",
        *align(rows),
        "",
    ]
    figures = [
        ["selection", f"{report['selection_share']:+.2%} of the dense model's training FLOPs"],
        ["all, against dense", f"{report['overhead_vs_dense']:+.2%}"],
    ]
    if report["tokens"] is not None:
        tokens = f"training on {report['tokens']:,.0f} tokens"
        figures.insert(0, [tokens, f"{report['train_zettaflops']:.4g} zettaFLOPs"])
    if mean_keys := report["mean_keys_flops_per_step"]:
        figures.append(["mean keys, in no total", f"{mean_keys:,} FLOPs a step"])
    width = max(len(label) for label, _ in figures)
    return "\n".join(lines + [f"{label:{width}}  {value}" for label, value in figures])


def align(rows: list[list[str]]) -> list[str]:
    """The rows of a table as lines: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


# From flags to a model


def build_language_model(
    arch: str, vocab_size: int, context: int, flags: Sequence[str]
) -> TransformerLanguageModel:
    """A model as fairseq-train would build it, if possible without memory for its parameters.

    Args:
        arch: name of the architecture.
        vocab_size: types in the dictionary, fairseq's special ones included.
        context: positions.
        flags: of the model.

    Raises:
        UsageError: names the flag and the value that cannot be honoured.
    """
    check_language_model(arch)
    parser = argparse.ArgumentParser(
        prog="fairseq-sffn cost",
        usage="%(prog)s --arch ARCH --vocab-size TYPES [flags of the model]",
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    models.ARCH_MODEL_REGISTRY[arch].add_args(parser)
    config = model_config(arch, context, parser.parse_args(flags))
    dictionary = Dictionary()
    for i in range(vocab_size - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    task = LanguageModelingTask(OmegaConf.create({}), dictionary)
    try:
        try:
            with torch.device("meta"):
                return models.build_model(config, task)
        except RuntimeError:  # a table that is computed, of which the meta device has no numbers
            return models.build_model(config, task)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--arch {arch}: fairseq cannot build this model: {reason}") from error


def check_language_model(arch: str) -> None:
    """Raises UsageError unless it is a Transformer language model."""
    known, names = models.ARCH_MODEL_REGISTRY, models.ARCH_MODEL_NAME_REGISTRY
    counted = [
        name
        for name, cls in known.items()
        if issubclass(cls, TransformerLanguageModel)
        and names[name] in models.MODEL_DATACLASS_REGISTRY  # not fairseq's model-parallel ones
    ]
    if arch in counted:
        return
    if arch not in known:
        close = ", ".join(difflib.get_close_matches(arch, counted))
        raise UsageError(f"--arch {arch}: is unknown" + (f"; there is {close}" if close else ""))
    kind = "another kind of model"
    if issubclass(known[arch], models.FairseqEncoderDecoderModel):
        kind = "an encoder-decoder model"
    raise UsageError(f"--arch {arch}: cost is for Transformer language models; this is {kind}")


def model_config(arch: str, context: int, options: argparse.Namespace) -> DictConfig:
    """The configuration of a model whose defaults are the architecture's.

    Args:
        arch: name of the architecture.
        context: positions.
        options: what the command line sets.

    Raises:
        UsageError: names the option and the value that cannot be honoured.
    """
    asked = set(vars(options))
    options.arch, options.task, options.tokens_per_sample = arch, "language_modeling", context
    models.ARCH_CONFIG_REGISTRY[arch](options)
    config = convert_namespace_to_omegaconf(options).model

    def refuse(name: str, reason: str) -> None:
        shown = flag(name) if config[name] is True else f"{flag(name)} {config[name]}"
        raise UsageError(f"{shown}: {reason}" + ("" if name in asked else f" (set by {arch})"))

    for name, reason in UNCOUNTED.items():
        if config[name]:
            refuse(name, reason)
    for name in POSITIVE:
        if config[name] < 1:
            refuse(name, "must be at least 1")
    if config.decoder_embed_dim % config.decoder_attention_heads:
        reason = f"does not divide --decoder-embed-dim {config.decoder_embed_dim}"
        refuse("decoder_attention_heads", reason)
    tied = config.share_decoder_input_output_embed
    if tied and config.decoder_input_dim != config.decoder_output_dim:
        reason = f"embeddings of --decoder-input-dim {config.decoder_input_dim} cannot be shared"
        refuse("decoder_output_dim", reason)
    return config
