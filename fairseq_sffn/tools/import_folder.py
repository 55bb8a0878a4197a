"""Make a checkpoint of fairseq from a folder that ``fairseq-sffn export`` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.loading import KEY, fingerprints
from ..checkpoints.structure import check_structure
from ..checkpoints.writing import write_checkpoint
from ..errors import UsageError
from ..export.tensor_files import library, load_model, read_json
from .export import TIED

EMBEDDING = "decoder.embed_tokens.weight"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn import``."""
    parser.add_argument(
        "folder", type=Path, help="written by fairseq-sffn export, or by save_pretrained later on"
    )
    parser.add_argument("output", type=Path, help="the .pt file to write")


def run(args: argparse.Namespace) -> str:
    """Write the checkpoint, and return what ``fairseq-sffn import`` prints.

    Raises:
        UsageError: the folder cannot be read, or is not of ``fairseq-sffn export``, or the
            checkpoint is there.
    """
    library()
    if args.output.exists():
        raise UsageError(f"{args.output}: is there already")
    if not args.output.parent.is_dir():
        raise UsageError(f"{args.output}: there is no folder {args.output.parent}")
    state = checkpoint(args.folder)
    write_checkpoint(state, str(args.output))
    return f"{args.output}: {len(state['model'])} tensors"


def checkpoint(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint with the model of a folder.

    Raises:
        UsageError: the folder cannot be read, or is not of ``fairseq-sffn export``.
    """
    config = read_json(folder / "config.json")
    cfg = config.get("fairseq")
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model"), dict):
        raise UsageError(f"{folder / 'config.json'}: is not of fairseq-sffn export")
    model: dict[str, Tensor] = load_model(folder)
    if EMBEDDING not in model:
        raise UsageError(f"{folder}: has no {EMBEDDING}")
    if config.get("tied_embeddings"):
        model[TIED] = model[EMBEDDING]
    names = cfg.get(KEY) or {"parameters": [], "sharded": []}
    state: dict[str, Any] = {
        "args": None,
        "cfg": {group: options for group, options in cfg.items() if group != KEY},
        "model": model,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": None,
    }
    state[KEY] = {**names, **fingerprints(model, in_parts=False)}
    check_structure(state, str(folder))
    return state
