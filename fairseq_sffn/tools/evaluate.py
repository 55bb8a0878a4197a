"""Compute the perplexity of a language model on several data sets, and how it uses its blocks."""

from __future__ import annotations

import argparse
import ast
import copy
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import encoders
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm

from ..checkpoints.reading import open_file
from ..errors import UsageError
from .cost import align
from .routing import Routing
from .text_bytes import count_bytes
from .zero_shot import encoder_of, encoder_parser

PLUGIN = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn evaluate``. :func:`run` parses those of fairseq-eval-lm."""
    parser.add_argument("checkpoint", help="as for fairseq-eval-lm --path")
    parser.add_argument(
        "sets",
        nargs="+",
        metavar="FOLDER:SPLIT",
        help="folders made by fairseq-preprocess, each with the split to evaluate, as in "
        "DATA-BIN:valid DATA-BIN:test",
    )
    parser.add_argument(
        "--routing", metavar="FOLDER:SPLIT", help="a set on which to measure how blocks are used"
    )
    parser.add_argument(
        "--bpe",
        choices=sorted(encoders.BPE_REGISTRY),
        help="encoder of the sets, with its own flags, such as --sentencepiece-model FILE: prints "
        "losses in bits per byte, too",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = (
        "Every other flag is fairseq-eval-lm's, such as --cpu --tokens-per-sample 128 "
        "--batch-size 32, or the encoder's, and comes after the sets. Losses are in bits per "
        "token. Only scored tokens count."
    )
    parser.set_defaults(other_flags=[])


def run(args: argparse.Namespace) -> str:
    """Return what ``fairseq-sffn evaluate`` prints.

    Raises:
        UsageError: the checkpoint or a set cannot be read, or a flag is not supported.
    """
    open_file(args.checkpoint).close()
    sets = {name: split_name(name) for name in [*args.sets, *filter(None, [args.routing])]}
    for name, (folder, split) in sets.items():
        if not (folder / f"{split}.idx").exists():
            raise UsageError(f"{name}: there is no {folder / split}.idx")
    report: dict[str, Any] = {"checkpoint": args.checkpoint, "sets": {}}
    bpe, flags = take_encoder(args.bpe, args.other_flags)
    base = configuration(args.checkpoint, *sets[args.sets[0]], flags)
    if words := base.common_eval.post_process:
        raise UsageError(f"--post-process {words}: its losses are of words, these are of tokens")
    if args.routing and (window := base.eval_lm.context_window):
        raise UsageError(f"--context-window {window}: with --routing tokens would count twice")
    types = base.task.get("output_dictionary_size", -1)
    sizes = {
        name: count_bytes(*sets[name], bpe, types if types >= 0 else None)
        for name in (args.sets if bpe else ())
    }
    for name in args.sets:
        print(f"evaluating {name}", file=sys.stderr, flush=True)
        found = perplexity(on_set(base, *sets[name]))
        report["sets"][name] = found | (per_byte(name, found, sizes[name]) if bpe else {})
    if args.routing:
        report |= routing(on_set(base, *sets[args.routing]))
    return json.dumps(report) if args.json else format_report(report)


def take_encoder(name: str | None, flags: list[str]) -> tuple[Any, list[str]]:
    """Return the encoder of ``--bpe``, and the flags that are not its own.

    Args:
        name: name of the encoder; ``None``: no encoder.
        flags: flags of the encoder and of ``fairseq-eval-lm``.

    Raises:
        UsageError: the encoder cannot be built.
    """
    if name is None:
        return None, flags
    options, others = encoder_parser(name, "fairseq-sffn evaluate").parse_known_args(flags)
    return encoder_of(name, vars(options), f"--bpe {name}"), others


def split_name(name: str) -> tuple[Path, str]:
    """Return the folder and the split of ``FOLDER:SPLIT``.

    Raises:
        UsageError: the name does not have this form.
    """
    folder, colon, split = name.rpartition(":")
    if not (folder and colon and split):
        raise UsageError(f"{name}: must be FOLDER:SPLIT, as in DATA-BIN:test")
    return Path(folder), split


def configuration(checkpoint: str, folder: Path, split: str, flags: list[str]) -> Any:
    """Return the configuration of ``fairseq-eval-lm``.

    Args:
        checkpoint, folder, split: what to evaluate.
        flags: other flags of ``fairseq-eval-lm``.
    """
    parser = options.get_eval_lm_parser()
    words = [str(folder), "--user-dir", str(PLUGIN), "--path", checkpoint, "--gen-subset", split]
    parsed = options.parse_args_and_arch(parser, [*words, "--no-progress-bar", *flags])
    return convert_namespace_to_omegaconf(parsed)


def on_set(cfg: Any, folder: Path, split: str) -> Any:
    """Return a copy of a configuration for another set.

    Composing a new configuration takes seconds.
    """
    cfg = copy.deepcopy(cfg)
    cfg.task.data, cfg.dataset.gen_subset = str(folder), split
    return cfg


def perplexity(cfg: Any) -> dict[str, float]:
    """Return the results of ``fairseq-eval-lm``.

    Returns:
        ``loss`` in bits per token, ``perplexity``, and the numbers of scored tokens (``tokens``)
        and of other tokens (``left_out_tokens``).
    """
    logging.disable(logging.INFO)
    try:
        found = eval_lm.main(cfg)
    finally:
        logging.disable(logging.NOTSET)
    loss = float(found["loss"])
    counts = {name: found[name] for name in ("tokens", "left_out_tokens")}
    return {"loss": loss, "perplexity": float(2**loss), **counts}


def per_byte(name: str, found: dict[str, float], size: int) -> dict[str, float]:
    """Return ``bytes``, the bytes of a set's text, and ``bits_per_byte``.

    Args:
        name: the set, for the message.
        found: the result of :func:`perplexity`.
        size: the bytes of all tokens of the set.

    Raises:
        UsageError: the loss lacks tokens.
    """
    if left_out := found["left_out_tokens"]:
        raise UsageError(
            f"{name}: has no bits per byte: {left_out:,} of {found['tokens'] + left_out:,} tokens "
            "are left out of the loss; --sample-break-mode none scores all"
        )
    return {"bytes": size, "bits_per_byte": found["loss"] * found["tokens"] / size}


def routing(cfg: Any) -> dict[str, Any]:
    """Measure how the sparse layers of a model use their blocks.

    Returns:
        ``routing``: see :meth:`.routing.Routing.report`; empty for a model without sparse layers.
        ``routing_set``: the numbers of tokens that the model read (``tokens``) and of other tokens
        (``left_out_tokens``).
    """
    split = cfg.dataset.gen_subset
    task = tasks.setup_task(cfg.task)
    # As fairseq_cli.eval_lm does.
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [cfg.common_eval.path],
        arg_overrides=ast.literal_eval(cfg.common_eval.model_overrides),
        task=task,
        suffix=cfg.checkpoint.checkpoint_suffix,
        strict=cfg.checkpoint.checkpoint_shard_count == 1,
        num_shards=cfg.checkpoint.checkpoint_shard_count,
    )
    cuda = torch.cuda.is_available() and not cfg.common.cpu
    model = (model.half() if cfg.common.fp16 else model).eval()
    model = model.cuda() if cuda else model
    task.load_dataset(split)
    batches = task.eval_lm_dataloader(
        dataset=task.dataset(split),
        max_tokens=cfg.dataset.max_tokens or 36000,
        batch_size=cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(model.max_positions()),
        num_workers=cfg.dataset.num_workers,
    )
    used = batches.split.tokens - batches.split.long - batches.split.cut
    with torch.no_grad(), Routing(model, task.source_dictionary, used) as seen:
        for sample in batches:
            sample = utils.move_to_cuda(sample) if cuda else sample
            seen.tokens(sample["net_input"]["src_tokens"])
            model(**sample["net_input"])
    counts = {"tokens": used, "left_out_tokens": batches.split.tokens - used}
    return {"routing": seen.report(), "routing_set": counts}


def numbers(counts: dict[str, Any], partly: bool) -> list[str]:
    """Return a table row's numbers of tokens; with ``partly``, also of tokens left out."""
    left_out = [f"{counts['left_out_tokens']:,}"] if partly else []
    return [f"{counts['tokens']:,}", *left_out]


def format_report(report: dict[str, Any]) -> str:
    """Return a table of the sets and, where it was measured, a table of routing, as text."""
    counted = [*report["sets"].values(), *filter(None, [report.get("routing_set")])]
    partly = any(counts["left_out_tokens"] for counts in counted)
    sized = any("bytes" in found for found in report["sets"].values())
    heads = ["bits/token", "perplexity", *(["bytes", "bits/byte"] * sized)]
    rows = [["", "tokens", *(["left out"] * partly), *heads]]
    for name, found in report["sets"].items():
        loss = found["loss"]
        shown = f"{found['perplexity']:.2f}" if math.isfinite(loss) else "inf"
        size = [f"{found['bytes']:,}", f"{found['bits_per_byte']:.4f}"] if sized else []
        rows.append([name, *numbers(found, partly), f"{loss:.4f}", shown, *size])
    if partly and "routing_set" in report:
        rows.append(["routing", *numbers(report["routing_set"], partly), *[""] * len(heads)])
    lines = [line.rstrip() for line in align(rows)]
    if layers := report.get("routing"):
        table = [
            [
                "layer",
                "blocks",
                "most loaded / mean",
                "unused",
                "mutual information with token / block entropy, bits",
            ]
        ]
        for name, layer in layers.items():
            bits = "" if layer["token_bits"] is None else f"{layer['token_bits']:.2f}"
            share = f"{bits} / {layer['block_bits']:.2f}"
            counts = layer["counts"]
            load = f"{max(counts) * len(counts) / max(sum(counts), 1):.2f}"
            table.append([name, f"{len(counts):,}", load, f"{counts.count(0):,}", share])
        lines += ["", *align(table)]
    return "\n".join(lines)
