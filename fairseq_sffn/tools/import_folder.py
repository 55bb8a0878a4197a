"""Make a checkpoint of fairseq from a folder that ``fairseq-sffn export`` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ..checkpoints.loading import KEY, fingerprints
from ..checkpoints.structure import check_structure
from ..checkpoints.writing import write_checkpoint
from ..errors import UsageError
from ..export.tensor_files import library, load_model, read_json
from .export import TIED
from .language_model import MOST_TYPES, build_from_config

EMBEDDING = "decoder.embed_tokens.weight"
ALIKE = (
    {torch.float16, torch.bfloat16, torch.float32, torch.float64},
    {torch.int16, torch.int32, torch.int64},
)
"""Dtypes that fairseq converts into each other when it loads a checkpoint."""


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
        UsageError: the folder cannot be read, or is not of ``fairseq-sffn export``, or its tensors
            are not those of its configuration.
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
    check_tensors(model, folder, cfg["model"], config.get("vocab_size"))
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


def check_tensors(
    tensors: dict[str, Tensor], folder: Path, options: dict[str, Any], types: Any
) -> None:
    """Refuse tensors that fairseq's model does not have, or has in another shape or dtype.

    Args:
        tensors: name -> tensor, of a checkpoint.
        folder: where they are from, for the message.
        options: the model's options in the configuration.
        types: types of the dictionary, fairseq's special ones included.

    Raises:
        UsageError: the message names the tensor.
    """
    path = folder / "config.json"
    if not isinstance(types, int) or not 4 < types <= MOST_TYPES:
        raise UsageError(f"{path}: vocab_size {types}: must be between 5 and {MOST_TYPES}")
    built = build_from_config(OmegaConf.create(options), types, str(path), stored=True)
    expected = dict(built.state_dict())
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UsageError(f"{folder}: has no {name}, which the model of config.json has")
        if name not in expected:
            raise UsageError(f"{folder}: {name} is not in the model of config.json")
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted.shape:
            raise UsageError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, and {tuple(wanted.shape)} in "
                "the model of config.json"
            )
        dtypes = next((alike for alike in ALIKE if wanted.dtype in alike), {wanted.dtype})
        if tensor.dtype not in dtypes:
            raise UsageError(
                f"{folder}: {name} has dtype {tensor.dtype}, and {wanted.dtype} in the model of "
                "config.json"
            )
