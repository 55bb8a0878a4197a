"""Average the parameters of several checkpoints of one model, each one file or sharded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.integrity import is_not_averaged
from ..checkpoints.loading import add_flags_to
from ..checkpoints.reading import SKIP_CHECKSUMS
from ..checkpoints.resuming import updates_of
from ..errors import UsageError
from .reshard import check_output, check_shards, read, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn average``."""
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="the .pt files to average"
    )
    parser.add_argument("output", type=Path, help="the .pt file to write; shards go beside it")
    parser.add_argument(
        "--shards", type=int, default=1, help="number of shards (default: 1, all in one file)"
    )
    add_flags_to(parser, SKIP_CHECKSUMS)
    parser.epilog = (
        "Everything except the model's parameters comes from the checkpoint with the most updates. "
        "The result has neither optimizer state nor a moving average. It can be evaluated, or "
        "trained further with --finetune-from-model."
    )


def run(args: argparse.Namespace) -> str:
    """Write the average, and return what ``fairseq-sffn average`` prints.

    Raises:
        UsageError: a checkpoint cannot be read, the checkpoints belong to different models, or the
            result cannot be written.
    """
    check_output(args)
    if len(args.checkpoints) < 2:
        raise UsageError(f"{args.checkpoints[0]}: give two checkpoints or more to average")
    files = [(path.stat().st_dev, path.stat().st_ino) for path in args.checkpoints if path.exists()]
    if len(set(files)) < len(files):
        raise UsageError(f"{' '.join(map(str, args.checkpoints))}: names a checkpoint twice")
    newest = max(args.checkpoints, key=updates_of)
    state = read(newest, named=args.shards > 1)
    others = [path for path in args.checkpoints if path != newest]
    state["model"] = average(newest, state["model"], others)
    state["last_optimizer_state"] = None
    for name in ("ema", "ema_fp32_params"):  # they belong to one checkpoint
        state["extra_state"].pop(name, None)
    if args.shards > 1:
        check_shards(state, args.shards)
    write(state, newest, args.output, args.shards)
    return f"{args.output}: mean of {len(args.checkpoints)} checkpoints"


def average(newest: Path, model: dict[str, Tensor], others: list[Path]) -> dict[str, Tensor]:
    """Return the mean of the parameters and buffers of all checkpoints.

    Sums are in fp64. Integers and booleans, such as hash tables, are copied and must be equal in
    all checkpoints.

    Args:
        newest: the checkpoint with the most updates, for messages.
        model: name -> tensor of the newest checkpoint. The function changes it in place.
        others: the other checkpoints.

    Returns:
        ``model``, with the means.

    Raises:
        UsageError: the checkpoints belong to different models, or a mean is not finite.
    """
    count = len(others) + 1
    exact = {name for name, tensor in model.items() if is_not_averaged(tensor)}
    types = {name: tensor.dtype for name, tensor in model.items()}
    for name in model.keys() - exact:
        model[name] = model[name].double()
    for path in others:
        other = read(path, named=False)["model"]
        check_same_model(newest, model, path, other, exact)
        for name in model.keys() - exact:
            model[name] += other.pop(name)
    for name in model.keys() - exact:
        model[name] = (model[name] / count).to(types[name])
        if not model[name].isfinite().all():
            raise UsageError(f"{newest} and others: cannot be averaged: {name} is not finite")
    return model


def check_same_model(
    first: Path, model: dict[str, Any], second: Path, other: dict[str, Any], exact: set[str]
) -> None:
    """Check that two checkpoints can be averaged.

    Args:
        first, second: the checkpoints, for the message.
        model, other: name -> tensor of the first and of the second checkpoint.
        exact: names of the integers and booleans, which must be equal.

    Raises:
        UsageError: names, shapes, types or exact values differ.
    """
    both = f"{first} and {second}: cannot be averaged"
    if names := sorted(model.keys() ^ other.keys()):
        raise UsageError(f"{both}: only one of them has {names[0]}")
    for name in model:
        if model[name].shape != other[name].shape:
            shapes = f"{list(model[name].shape)} and {list(other[name].shape)}"
            raise UsageError(f"{both}: {name} is {shapes}")
        if (name in exact) != is_not_averaged(other[name]):
            raise UsageError(f"{both}: {name} is of types {model[name].dtype}, {other[name].dtype}")
        if name in exact and not torch.equal(model[name], other[name]):
            raise UsageError(f"{both}: {name} differs, as in models of different seeds or --hash-*")
