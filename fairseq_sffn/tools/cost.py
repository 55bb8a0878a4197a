"""Count the parameters and FLOPs of an architecture.

Only the FLOPs of matrix products count. A multiply-add counts as 2.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules import AdaptiveInput
from torch import nn

from ..errors import UsageError, flag
from ..memory import SparseMemory
from ..models.gated import ffn_width
from .language_model import build_language_model


@dataclass(frozen=True)
class Cost:
    """Cost of a language model, or of a part of it.

    Attributes:
        params: trained parameters. Tied parameters count once.
        active_params: parameters that one token uses, with those of the selectors and all
            embeddings.
        flops_per_token: FLOPs of one forward pass for one token. They include the matrix products
            of attention (with scores against ``context`` positions), of FFNs, of the vocabulary
            projection and of maps between unequal widths, and the selection of blocks.
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
    """Return the sum of the costs of all parts."""
    return sum(parts.values(), Cost())


def cost_by_part(model: TransformerLanguageModel, context: int) -> dict[str, Cost]:
    """Return the cost of a language model by part.

    Parts are ``attention``, ``dense_ffn``, ``selection`` of blocks, sparse ``memory`` without its
    selection, ``vocabulary`` (embedding and projection) and ``other`` (layer norms, learned
    positions, maps between unequal widths).

    Args:
        model: a language model of the plugin or fairseq's ``transformer_lm``.
        context: tokens that a token attends to.

    Returns:
        Name of the part -> cost.

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
    """Return the cost of modules that compute linear maps only. Tied parameters count once."""
    together = nn.ModuleList(modules)
    params = sum(parameter.numel() for parameter in together.parameters())
    maps = [module for module in together.modules() if isinstance(module, nn.Linear)]
    return Cost(params, params, sum(2 * linear.weight.numel() for linear in maps))


def _memories(module: nn.Module) -> list[SparseMemory]:
    return [child for child in module.modules() if isinstance(child, SparseMemory)]


def _selection(memory: SparseMemory) -> Cost:
    config = memory.config
    params = config.selection_params()
    return Cost(params, params, config.selection_flops_per_token())


def _active_cells(memory: SparseMemory) -> Cost:
    """Return the cost of a memory without its selection."""
    config, selection = memory.config, _selection(memory)
    return Cost(
        config.num_params() - selection.params,
        config.active_params() - selection.active_params,
        config.flops_per_token() - selection.flops_per_token,
    )


def model_cost(model: TransformerLanguageModel, context: int) -> Cost:
    """Return the cost of a language model; see :func:`cost_by_part`."""
    return total(cost_by_part(model, context))


def dense_counterpart(model: TransformerLanguageModel, context: int) -> dict[str, Cost]:
    """Return the cost by part of the same model with dense layers only.

    Args:
        model, context: see :func:`cost_by_part`.
    """
    parts = cost_by_part(model, context)
    width, hidden = model.decoder.embed_dim, ffn_width(model.decoder.args, "decoder")
    dense_ffn = Cost()
    for memory in _memories(model):
        maps = 2 + (memory.config.glu is not None)
        params = maps * width * hidden + (maps - 1) * hidden + width
        dense_ffn += Cost(params, params, 2 * maps * width * hidden)
    sparse = {"selection": Cost(), "memory": Cost()}
    return parts | sparse | {"dense_ffn": parts["dense_ffn"] + dense_ffn}


def training_flops_per_token(parts: dict[str, Cost]) -> int:
    """Return the FLOPs to train on a token.

    Training takes the FLOPs of three forward passes. The layers take a fourth forward pass, which
    recomputes their activations (Narayanan et al. 2021, arXiv 2104.04473, appendix).
    """
    outside_layers = parts["vocabulary"] + parts["other"]
    return 4 * total(parts).flops_per_token - outside_layers.flops_per_token


def mean_keys_flops(model: TransformerLanguageModel) -> int:
    """Return the FLOPs of a step that compute the mean keys of all layers.

    Each number in the key tables takes one addition. The costs per token do not include them.
    """
    configs = [memory.config.routed for memory in _memories(model)]
    return sum(config.selector_class.flops_per_step(config) for config in configs)


def checkpoint_cost(path: str, data: str) -> dict[str, Any]:
    """Return the cost of the model in a checkpoint, at the context of its training.

    Args:
        path: the checkpoint.
        data: folder with the model's ``dict.txt``.

    Returns:
        Name of each attribute of :class:`Cost` -> value.

    Raises:
        UsageError: the file is not a checkpoint, or holds code.
    """
    ensemble, _, task = checkpoint_utils.load_model_ensemble_and_task([path], {"data": data})
    return asdict(model_cost(ensemble[0], task.args.tokens_per_sample))


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn cost``. :func:`run` parses the model's own flags."""
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
        help="tokens that a token attends to, and positions of the model, as --tokens-per-sample "
        "in training (default: 1024)",
    )
    parser.add_argument(
        "--tokens", type=float, help="tokens to train on, such as 60e9, for the FLOPs of training"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = (
        "Every other flag is the model's, such as --decoder-layers 12 --sffn-block-size 256. "
        "Training takes three forward passes, and a fourth one of the layers, which recomputes "
        "their activations. Only the FLOPs of matrix products count. A multiply-add counts as 2."
    )
    parser.set_defaults(other_flags=[])


def run(args: argparse.Namespace) -> str:
    """Return what ``fairseq-sffn cost`` prints.

    Raises:
        UsageError: a flag has a wrong value. The message names the flag, the value and the reason.
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
    """Return every figure of a model's cost.

    Args:
        model: a language model.
        context: tokens that a token attends to.
        tokens: training tokens; ``None``: not known.

    Returns:
        A dictionary with the attributes of :class:`Cost`, and:

        - ``train_zettaflops``: training FLOPs in 1e21, or ``None``;
        - ``selection_share``, ``overhead_vs_dense``: shares of the training FLOPs of the dense
          counterpart;
        - ``mean_keys_flops_per_step``: see :func:`mean_keys_flops`;
        - ``parts``: name of the part -> attributes of its cost.
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
    """Return a table of the parts and a line for each other figure, as text."""
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
    """Return the rows of a table as lines: the first column aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
