"""Turns a checkpoint in parts into one file, or into another number of parts, and back."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils

from ..checkpoints.loading import KEY, fingerprints, read_checkpoint
from ..errors import UsageError
from ..parallel.checkpoints import (
    RESHARDED,
    Part,
    cut_part,
    new_folder,
    put_parts,
    save_part,
    take_parts,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("checkpoint", type=Path, help="the .pt file, in parts or not")
    parser.add_argument("output", type=Path, help="the .pt file to write; its parts go beside it")
    parser.add_argument(
        "--shards", type=int, default=1, help="number of parts (default: 1, all in one file)"
    )


def run(args: argparse.Namespace) -> str:
    """Writes the checkpoint.

    Raises:
        UsageError: it cannot be read, not be written, or not be in so many parts.
    """
    if args.shards < 1:
        raise UsageError(f"--shards {args.shards}: must be at least 1")
    if args.shards > 1 and args.output.suffix != ".pt":
        raise UsageError(
            f"{args.output}: must end in .pt, or training would remove its parts: see --shards"
        )
    if args.output.exists():
        raise UsageError(f"{args.output}: is there already")
    if not args.output.parent.is_dir():
        raise UsageError(f"{args.output}: there is no folder {args.output.parent}")
    state = read(args.checkpoint)
    if args.shards > 1:
        check_shards(state, args.shards)
    write(state, args)
    return f"{args.output}: {args.shards} part{'s' * (args.shards > 1)}"


def read(path: Path) -> dict[str, Any]:
    """A checkpoint with all that is in its parts.

    Raises:
        UsageError: it cannot be read.
    """
    state = read_checkpoint(str(path))
    if KEY not in state:
        raise UsageError(
            f"checkpoint {path}: does not tell its parameters' names, which this "
            "version of fairseq_sffn does; resume training from it, and stop after an update"
        )
    put_parts(state, path, Part())
    state[KEY] = {key: state[KEY][key] for key in ("parameters", "sharded")}
    return state


def write(state: dict[str, Any], args: argparse.Namespace) -> None:
    """Writes a checkpoint, in so many parts, which it takes out of the state.

    Raises:
        UsageError: it cannot be written, or the optimizer's state cannot be cut; nothing is left
            then.
    """
    names, shards = state[KEY], args.shards
    folder = new_folder(args.output, f"{RESHARDED}{args.output.stem}")
    try:
        if shards > 1:
            for shard in range(shards):
                part = Part(shard, shards, tuple(names["sharded"]), names["parameters"])
                save_part(folder, part, cut_part(state, args.checkpoint, part))
            take_parts(state, part)
            names |= {"folder": folder.name, "shards": shards}
        state[KEY] = names | fingerprints(state["model"], in_parts=shards > 1)
        checkpoint_utils.torch_persistent_save(state, str(args.output))
    except UsageError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_shards(state: dict[str, Any], shards: int) -> None:
    """Raises UsageError where the layers' blocks cannot be in so many parts."""
    if not state[KEY]["sharded"]:
        raise UsageError(f"--shards {shards}: this model has no blocks that can be shared out")
    for name in state[KEY]["sharded"]:
        size = int(state["model"][name.rpartition(".")[0] + ".block_size"])
        blocks = len(state["model"][name]) // size
        if blocks % shards:
            raise UsageError(f"--shards {shards}: does not divide the {blocks} blocks of a layer")
