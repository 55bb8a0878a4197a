"""Estimate memory, bytes sent and the share of communication of training on several ranks.

All figures are for one rank and for one update on one micro-batch. They follow from sizes alone.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel

from ..errors import UsageError, flag
from ..memory import ConfigError, SparseMemory
from ..memory.sharding import SHARDED, check_sharding
from .activations import activation_bytes
from .cost import align, cost_by_part, total, training_flops_per_token
from .language_model import build_language_model
from .traffic import (
    all_reduce_bytes,
    all_to_all_share,
    expected_sent_bytes,
    mean_keys_bytes,
    ring_share,
)

MOMENT_BYTES = 8
"""Bytes of Adam's two moments of a parameter, in fp32. A checkpoint has them in every precision."""
PRECISIONS = {
    "fp32": (torch.float32, 8),
    "bf16": (torch.bfloat16, 16),
    "memory_efficient_bf16": (torch.bfloat16, 8),
    "fp16": (torch.float16, 16),
    "memory_efficient_fp16": (torch.float16, 8),
}
"""Precision -> dtype of parameters, gradients and hidden states, and bytes of optimizer state for
each parameter. The state is Adam's two moments in fp32. ``bf16`` and ``fp16`` also have fp32 copies
of parameter and gradient."""

LEFT_OUT = (
    "Not counted: temporary buffers, such as logits, gradients of activations and copies that "
    "kernels make; DDP's buckets; tables of token ids; what the allocator loses; sums of losses, "
    "norms and logs."
)


@dataclass(frozen=True)
class Setting:
    """Settings of a training.

    Attributes:
        world_size: ranks.
        sffn_expert_parallel: ranks over which the blocks of each sparse layer are sharded.
        tokens_per_rank: tokens of a micro-batch on a rank.
        tokens_per_sample: tokens that a token attends to.
        precision: a key of ``PRECISIONS``.
        bandwidth: GB/s that a rank sends to other nodes.
        flops: TFLOP/s that a rank achieves.
        ranks_per_node: consecutive ranks that are a node.
        node_bandwidth: GB/s that a rank sends within its node.
    """

    world_size: int
    sffn_expert_parallel: int
    tokens_per_rank: int
    tokens_per_sample: int
    precision: str
    bandwidth: float
    flops: float
    ranks_per_node: int = 1
    node_bandwidth: float = 300.0


def plan_figures(model: TransformerLanguageModel, setting: Setting) -> dict[str, Any]:
    """Return every figure of the plan.

    Args:
        model: a language model, not sharded.
        setting: how it is trained.

    Returns:
        A dictionary with the figures of one rank:

        - ``params``: numbers of ``replicated`` and ``sharded`` parameters;
        - ``memory``, ``activations``, ``sent``: bytes by part, expected values if routing is even;
        - ``sent_between_nodes``: bytes of ``sent`` that leave the node, the mean of its ranks;
        - ``sent_per_sparse_layer``: bytes of each sparse layer;
        - ``checkpoint``: bytes of the ``file``, of each ``part``, and of ``all`` files;
        - ``sent_seconds``: time of each part of ``sent``;
        - ``compute_seconds``, ``communication_seconds``: times without overlap;
        - ``communication_share``: share of communication in the sum of both times.
    """
    ranks, shards = setting.world_size, setting.sffn_expert_parallel
    tokens = setting.tokens_per_rank
    dtype, state_bytes = PRECISIONS[setting.precision]
    size, recomputed = dtype.itemsize, bool(model.decoder.cfg.checkpoint_activations)
    memories = [module for module in model.modules() if isinstance(module, SparseMemory)]
    tables = [getattr(memory, name) for memory in memories for name in SHARDED]
    in_tables = sum(table.numel() for table in tables if table is not None) if shards > 1 else 0
    whole = sum(parameter.numel() for parameter in model.parameters())
    replicated, sharded = whole - in_tables, in_tables // shards
    params = replicated + sharded

    context = min(tokens, setting.tokens_per_sample)
    activations = activation_bytes(model, tokens, context, shards, dtype)
    memory = {
        "parameters": params * size,
        "gradients": params * size,
        "optimizer_state": params * state_bytes,
        "activations": sum(activations.values()),
    }
    layers, keys = [0.0] * len(memories), 0
    if shards > 1:
        configs = [memory.config.routed for memory in memories]
        layers = [expected_sent_bytes(c, shards, size, tokens, recomputed) for c in configs]
        keys = sum(mean_keys_bytes(c, shards, size, recomputed) for c in configs)
    sent = {
        "sparse_layers": round(sum(layers)),
        "mean_keys": keys,
        "replicated_gradients": round(all_reduce_bytes(replicated * size, ranks)),
        "sharded_gradients": round(all_reduce_bytes(sharded * size, ranks // shards)),
    }
    per_node = setting.ranks_per_node
    shares = {
        "sparse_layers": all_to_all_share(shards, per_node),
        "mean_keys": ring_share(shards, per_node),
        "replicated_gradients": ring_share(ranks, per_node),
        # Ranks that hold the same blocks: every ``shards``-th one.
        "sharded_gradients": ring_share(ranks // shards, max(per_node // shards, 1)),
    }
    between = {name: round(size * shares[name]) for name, size in sent.items()}
    # A fourth pass only if activations are recomputed.
    parts = cost_by_part(model, context)
    flops = training_flops_per_token(parts) if recomputed else 3 * total(parts).flops_per_token
    compute = tokens * flops / (setting.flops * 1e12)
    # Both links work at the same time.
    seconds = {
        name: max(
            between[name] / setting.bandwidth, (size - between[name]) / setting.node_bandwidth
        )
        / 1e9
        for name, size in sent.items()
    }
    communication = sum(seconds.values())
    file, part = ((size + MOMENT_BYTES) * count for count in (replicated, sharded))
    return {
        "params": {"replicated": replicated, "sharded": sharded},
        "memory": memory | {"total": sum(memory.values())},
        "activations": activations,
        "sent": sent | {"total": sum(sent.values())},
        "sent_between_nodes": between | {"total": sum(between.values())},
        "sent_seconds": seconds,
        "sent_per_sparse_layer": list(map(round, layers)),
        "checkpoint": {"file": file, "part": part, "all": file + shards * part},
        "compute_seconds": compute,
        "communication_seconds": communication,
        "communication_share": communication / (communication + compute),
    }


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn plan``. :func:`run` parses the model's own flags."""
    parser.add_argument("--arch", required=True, help="a language model, as for fairseq-train")
    numbers = {
        "vocab_size": (51200, "types in the dictionary, fairseq's special ones included"),
        "world_size": (None, "ranks: processes, with a GPU each"),
        "sffn_expert_parallel": (1, "ranks over which the blocks of each layer are sharded"),
        "tokens_per_rank": (None, "tokens of the micro-batch on each rank"),
        "tokens_per_sample": (1024, "tokens that a token attends to, and positions of the model"),
        "bandwidth": (25.0, "GB/s that a rank sends to other nodes"),
        "flops": (100.0, "TFLOP/s that a rank achieves"),
        "ranks_per_node": (1, "consecutive ranks that are a node"),
        "node_bandwidth": (300.0, "GB/s that a rank sends within its node"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            flag(name),
            type=int if default is None else type(default),
            default=default,
            required=default is None,
            help=text if default is None else f"{text} (default: {default})",
        )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="as fairseq's flags, fp16 with --fp16-no-flatten-grads (default: fp32)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")
    parser.epilog = (
        "Every other flag is the model's, such as --decoder-layers 12 or --checkpoint-activations. "
        f"Memory is for Adam and fused attention, with even routing. {LEFT_OUT}"
    )
    parser.set_defaults(other_flags=[])


def run(args: argparse.Namespace) -> str:
    """Return what ``fairseq-sffn plan`` prints.

    Raises:
        UsageError: a flag has a wrong value. The message names the flag, the value and the reason.
    """
    whole = (
        *("world_size", "sffn_expert_parallel", "tokens_per_rank", "tokens_per_sample"),
        "ranks_per_node",
    )
    at_least = dict.fromkeys(whole, 1) | {"vocab_size": Dictionary().nspecial + 1}
    for name, least in at_least.items():
        if (value := getattr(args, name)) < least:
            raise UsageError(f"{flag(name)} {value}: must be at least {least}")
    for name in ("bandwidth", "flops", "node_bandwidth"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            raise UsageError(f"{flag(name)} {value}: must be positive and finite")
    shards = args.sffn_expert_parallel
    if args.world_size % shards:
        reason = f"does not divide --world-size {args.world_size}"
        raise UsageError(f"--sffn-expert-parallel {shards}: {reason}")
    nodes = args.ranks_per_node
    if args.world_size > nodes and args.world_size % nodes:
        reason = f"does not divide --world-size {args.world_size}"
        raise UsageError(f"--ranks-per-node {nodes}: {reason}")
    if nodes % shards and shards % nodes:
        reason = f"neither divides --sffn-expert-parallel {shards} nor is a multiple of it"
        raise UsageError(f"--ranks-per-node {nodes}: {reason}")
    model = build_language_model(
        args.arch, args.vocab_size, args.tokens_per_sample, args.other_flags
    )
    check_shards(model, shards)
    setting = Setting(**{name: getattr(args, name) for name in Setting.__dataclass_fields__})
    asked = {"arch": args.arch, "vocab_size": args.vocab_size} | asdict(setting)
    report = asked | plan_figures(model, setting)
    return json.dumps(report, indent=2) if args.json else format_report(report)


def check_shards(model: TransformerLanguageModel, shards: int) -> None:
    """Check that the blocks of a model can be sharded over a number of ranks.

    Raises:
        UsageError: they cannot. The message names the flag, the value and the reason.
    """
    memories = [module for module in model.modules() if isinstance(module, SparseMemory)]
    reason = "this model has no sparse layers" if shards > 1 and not memories else None
    try:
        for memory in memories:
            check_sharding(memory.config, shards)
    except ConfigError as error:
        reason = error.reason
    if reason is not None:
        raise UsageError(f"--sffn-expert-parallel {shards}: {reason}")


def format_report(report: dict[str, Any]) -> str:
    """Return a table of memory and a table of bytes sent and their times, as text."""

    def label(name: str) -> str:
        return name.replace("_", " ").replace("ffn", "FFN")

    memory = [["memory of a rank", "MB"]]
    for name, size in report["memory"].items():
        memory.append([label(name), f"{size / 1e6:,.1f}"])
        if name == "activations":
            parts = report["activations"].items()
            memory += [[f"  {label(part)}", f"{kept / 1e6:,.1f}"] for part, kept in parts if kept]
    sent = [["sent by a rank", "MB", "between nodes", "ms"]]
    for name, size in report["sent"].items():
        milliseconds = report["sent_seconds"].get(name, report["communication_seconds"]) * 1e3
        between = report["sent_between_nodes"][name]
        sent.append(
            [label(name), f"{size / 1e6:,.1f}", f"{between / 1e6:,.1f}", f"{milliseconds:,.1f}"]
        )
    sent.append(["compute", "", "", f"{report['compute_seconds'] * 1e3:,.1f}"])
    file, part, whole = (f"{size / 1e6:,.1f} MB" for size in report["checkpoint"].values())
    parts = report["sffn_expert_parallel"]
    named = f", a file of {file} and {parts:,} parts of {part}" if parts > 1 else ""
    params = ", ".join(f"{count:,} {name}" for name, count in report["params"].items())
    lines = [
        f"{report['arch']}: {report['vocab_size']:,} types, {report['precision']}",
        f"{report['world_size']:,} ranks, blocks over {report['sffn_expert_parallel']:,}; "
        f"of each {report['tokens_per_rank']:,} tokens, context {report['tokens_per_sample']:,}",
        f"nodes of {report['ranks_per_node']:,} ranks",
        f"parameters of a rank: {params}",
        *("", *align(memory), "", *align(sent), ""),
        f"communication is {report['communication_share']:.1%} of a step without overlap",
        f"checkpoint: {whole}{named}",
        *("", *textwrap.wrap(LEFT_OUT, 80)),
    ]
    return "\n".join(lines)
