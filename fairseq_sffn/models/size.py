"""Estimate the memory of a Transformer's parameters before it is built."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from fairseq import models
from fairseq.models.transformer_lm import TransformerLanguageModel

from ..errors import UsageError, flag
from ..memory import MemoryConfig, Selector
from .gated import ffn_width
from .layer_plan import layer_groups

BYTES = 4
"""Bytes of a parameter. fairseq builds every model in fp32."""


class Part(NamedTuple):
    """Parameters of one kind.

    Attributes:
        name: name of the kind, in the plural.
        params: number of parameters, without small ones such as biases.
        options: name -> value of the options that determine the number.
    """

    name: str
    params: int
    options: dict[str, int]


def check_size(args: Any, task: Any) -> None:
    """Refuse a model whose parameters do not fit into the memory of this machine.

    A model on the meta device takes no memory.

    Args:
        args: the options of one of fairseq's Transformers, each in its range.
        task: the task, which has the dictionaries.

    Raises:
        UsageError: the parameters do not fit. The message names the largest option of the largest
            part, and its memory.
    """
    memory = physical_memory()
    if memory is None or torch.get_default_device().type == "meta":
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parts = parts_of(args, task)
    total = sum(part.params for part in parts) * BYTES * processes
    if total <= memory:
        return
    largest = max(parts, key=lambda part: part.params)
    name = max(largest.options, key=lambda option: largest.options[option])
    what, taken = f"its {largest.name}", largest.params * BYTES * processes
    if taken <= memory:
        what, taken = "the parameters of this model", total
    where = f" in {processes} processes" if processes > 1 else ""
    raise UsageError(
        f"{flag(name)} {getattr(args, name)}: {what} take {in_words(taken)} in fp32{where}, "
        f"this machine has {in_words(memory)}"
    )


def check_selector_size(config: MemoryConfig, options: dict[str, int]) -> None:
    """Refuse a selector whose own parameters do not fit into the memory of this machine.

    Args:
        config: the memory of a sparse layer.
        options: name -> value of the selector's options that are numbers.

    Raises:
        UsageError: the parameters do not fit. The message names the largest option, and the memory
            of the selector.
    """
    memory = physical_memory()
    taken = config.selection_params() * BYTES
    on_meta = torch.get_default_device().type == "meta"
    if memory is None or on_meta or taken <= memory or not options:
        return
    name = max(options, key=lambda option: options[option])
    raise UsageError(
        f"{flag(name)} {options[name]}: the selector of a layer takes {in_words(taken)} in fp32, "
        f"this machine has {in_words(memory)}"
    )


def parts_of(args: Any, task: Any) -> list[Part]:
    """Return the parts of a model in one process. Only one shard of sharded tables counts.

    Args:
        args, task: see :func:`check_size`.
    """
    name = getattr(args, "_name", None) or args.arch
    cls = models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY[name]
    if issubclass(cls, TransformerLanguageModel):
        return parts_of_side(args, "decoder", task.source_dictionary, cross_attention=False)
    encoder = parts_of_side(args, "encoder", task.source_dictionary, cross_attention=False)
    return encoder + parts_of_side(args, "decoder", task.target_dictionary, cross_attention=True)


def parts_of_side(args: Any, side: str, dictionary: Any, cross_attention: bool) -> list[Part]:
    """Return the parts of an encoder or a decoder.

    Args:
        args: the model's options.
        side: ``encoder`` or ``decoder``.
        dictionary: the dictionary of the side; ``None``: not known.
        cross_attention: whether layers attend to an encoder.
    """

    def options(*names: str) -> dict[str, int]:
        values = {name: getattr(args, name, None) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    width, hidden, layers = (f"{side}_{name}" for name in ("embed_dim", "ffn_embed_dim", "layers"))
    sizes = options(width, hidden, layers)
    if len(sizes) < 3:  # options of a checkpoint lack the model's defaults
        return []
    d, _, count = sizes.values()
    gated = getattr(args, "sffn_glu", None) is not None
    f = ffn_width(args, side)
    if gated and args.sffn_glu_width is not None:
        hidden = "sffn_glu_width"
    sparse = sparse_layers(args, side)
    if kept := getattr(args, f"{side}_layers_to_keep", None):  # a trained model, pruned
        count = len(kept.split(","))
    dense = count - sum(number for _, number in sparse)
    maps = 4 * (1 + cross_attention)
    parts = [
        Part("attention layers", count * maps * d * d, options(width, layers)),
        Part("dense FFNs", dense * (2 + gated) * d * f, options(hidden, width, layers)),
    ]
    if sparse:
        shards = args.sffn_expert_parallel
        expansion = max(layer.sffn_expansion for layer, _ in sparse)
        tables = sum(table_params(layer, d, f) * number for layer, number in sparse) // shards
        if shards > 1:  # each process draws a whole table and keeps its shard
            tables += expansion * f * d
        name = "sffn_expansion" if expansion == args.sffn_expansion else "sffn_layers"
        parts.append(Part("tables", tables, {name: expansion, **options(hidden, width, layers)}))
    own = any(
        getattr(args, name, None)
        for name in ("adaptive_input", "adaptive_softmax_cutoff", "character_embeddings")
    )
    if dictionary is not None and not own:
        embedding = next(iter(options(f"{side}_input_dim", width)))
        parts.append(
            Part("embeddings", len(dictionary) * getattr(args, embedding), options(embedding))
        )
    positions = {"encoder": "max_source_positions", "decoder": "max_target_positions"}[side]
    if getattr(args, positions, None) is None:
        positions = "tokens_per_sample"
    if options(positions) and not getattr(args, "no_token_positional_embeddings", False):
        length = getattr(args, positions)
        parts.append(Part("positions", length * d, options(positions, width)))
    return parts


def sparse_layers(args: Any, side: str) -> list[tuple[Any, int]]:
    """Return the sparse layers that are built.

    Args:
        args, side: see :func:`parts_of_side`.

    Returns:
        Options of the layers, and number of layers with these options; empty if the model has no
        valid sparse options.
    """
    names = ("sffn_freq", "sffn_expansion", "sffn_expert_parallel")
    sizes = [getattr(args, name, None) for name in names]
    known = all(isinstance(size, int) and size > 0 for size in sizes)
    if not known:
        return []
    groups = layer_groups(args, side)
    if any(str(group.options.sffn_selector) not in Selector.registry for group in groups):
        return []
    if kept := getattr(args, f"{side}_layers_to_keep", None):
        built = [int(number) for number in kept.split(",") if number.isdecimal()]
        return [(group.options, sum(n in group.numbers for n in built)) for group in groups]
    return [(group.options, len(group.numbers)) for group in groups]


def table_params(layer: Any, embed_dim: int, ffn_embed_dim: int) -> int:
    """Return the number of parameters in the tables of a layer.

    Args:
        layer: the options of the layer.
        embed_dim, ffn_embed_dim: widths of the side.
    """
    full = Selector.registry[str(layer.sffn_selector)].key_table == "full"
    gated = getattr(layer, "sffn_glu", None) is not None
    return (1 + full + gated) * layer.sffn_expansion * ffn_embed_dim * embed_dim


def physical_memory() -> int | None:
    """Return the memory of this machine in bytes; ``None``: not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def in_words(size: float) -> str:
    """Return a number of bytes with its unit, such as 24 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"):
        if size < 999.5 or unit == "YB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
