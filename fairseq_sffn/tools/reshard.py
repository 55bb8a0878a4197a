"""Convert a checkpoint, one file or sharded, to another number of shards or to one file."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from ..checkpoints.loading import KEY, add_flags_to, fingerprints, read_checkpoint
from ..checkpoints.part_files import RESHARDED, new_folder
from ..checkpoints.reading import SKIP_CHECKSUMS
from ..checkpoints.writing import write_checkpoint
from ..errors import UsageError
from ..expert_parallel.parts import Part, cut_part, put_parts, save_part, take_parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn reshard``."""
    parser.add_argument("checkpoint", type=Path, help="the .pt file, sharded or not")
    parser.add_argument("output", type=Path, help="the .pt file to write; shards go beside it")
    parser.add_argument(
        "--shards", type=int, default=1, help="number of shards (default: 1, all in one file)"
    )
    add_flags_to(parser, SKIP_CHECKSUMS)


def run(args: argparse.Namespace) -> str:
    """Write the checkpoint, and return what ``fairseq-sffn reshard`` prints.

    Raises:
        UsageError: the checkpoint cannot be read, written, or divided into this many parts.
    """
    check_output(args)
    state = read(args.checkpoint)
    if args.shards > 1:
        check_shards(state, args.shards)
    write(state, args.checkpoint, args.output, args.shards)
    return f"{args.output}: {args.shards} part{'s' * (args.shards > 1)}"


def check_output(args: argparse.Namespace) -> None:
    """Check ``--shards`` and the file to write.

    Raises:
        UsageError: the number is below 1, or the file cannot be written under this name.
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


def read(path: Path, named: bool = True) -> dict[str, Any]:
    """Read a checkpoint, and add the parameters and optimizer state of all of its parts.

    Args:
        path: the checkpoint.
        named: whether the checkpoint must have the names of its parameters, in the optimizer's
            order.

    Raises:
        UsageError: the checkpoint cannot be read, or lacks the names.
    """
    state = read_checkpoint(str(path), mapped=True)
    if KEY not in state and not named:
        return state
    if KEY not in state:
        raise UsageError(
            f"checkpoint {path}: does not tell its parameters' names, which this "
            "version of fairseq_sffn does; resume training from it, and stop after an update"
        )
    put_parts(state, path, Part())
    state[KEY] = {key: state[KEY][key] for key in ("parameters", "sharded")}
    return state


def write(state: dict[str, Any], source: Path, output: Path, shards: int) -> None:
    """Write a checkpoint in a number of parts.

    Args:
        state: the whole checkpoint. The function moves the sharded parameters out of it.
        source: the file that it was read from, for messages.
        output: the file to write.
        shards: number of parts.

    Raises:
        UsageError: the checkpoint cannot be written, or the optimizer's state cannot be cut. No
            part is left in this case.
    """
    names = state.get(KEY, {})
    folder = new_folder(output, f"{RESHARDED}{output.stem}")
    try:
        if shards > 1:
            for shard in range(shards):
                part = Part(shard, shards, tuple(names["sharded"]), names["parameters"])
                save_part(folder, part, cut_part(state, source, part))
            take_parts(state, part)
            names |= {"folder": folder.name, "shards": shards}
        if names:
            state[KEY] = names | fingerprints(state["model"], in_parts=shards > 1)
        write_checkpoint(state, str(output))
    except UsageError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_shards(state: dict[str, Any], shards: int) -> None:
    """Check that the blocks of each layer can be divided into a number of parts.

    Raises:
        UsageError: the model has no sharded blocks, or the number does not divide them.
    """
    if not state[KEY]["sharded"]:
        raise UsageError(f"--shards {shards}: this model has no blocks that can be sharded")
    for name in state[KEY]["sharded"]:
        size = int(state["model"][name.rpartition(".")[0] + ".block_size"])
        blocks = len(state["model"][name]) // size
        if blocks % shards:
            raise UsageError(f"--shards {shards}: does not divide the {blocks} blocks of a layer")
