"""Reading a fairseq checkpoint without evaluating, importing or opening anything that it names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.file_io import PathManager
from omegaconf import OmegaConf

from ..errors import UsageError
from .integrity import fingerprint, is_not_averaged
from .old_names import rename
from .reading import SKIP_CHECKSUMS, read_file
from .structure import check_structure

KEY = "sffn"
"""Name of the plugin's own entry in a checkpoint; see :mod:`.structure`."""
TRUST = "FAIRSEQ_SFFN_TRUST_CHECKPOINT"
"""Environment variable that ``--trust-checkpoint`` sets."""
OVERRIDE = "trust_checkpoint"
"""Name of the same switch among the overrides of Python callers."""
FLAGS = {
    "--trust-checkpoint": (
        TRUST,
        "use a checkpoint's configuration as it is, even if it names models, tasks or files that "
        "fairseq_sffn does not know: it can then run any code",
    ),
    "--skip-checksums": (
        SKIP_CHECKSUMS,
        "do not compare checkpoints with their checksums (half a second per gigabyte)",
    ),
}
"""Flag of commands that load a checkpoint -> (environment variable, help text).

Processes that fairseq starts inherit the variable."""


def add_flags_to(parser: Any, *variables: str) -> None:
    """Add the flags of ``FLAGS`` to a parser, or to a group of it.

    Args:
        parser: the parser or group.
        variables: environment variables of the flags to add. Without any, all flags are added.
    """
    for name, (variable, text) in FLAGS.items():
        if variable in (variables or (TRUST, SKIP_CHECKSUMS)):
            action = {"action": SetVariable, "const": variable, "nargs": 0, "help": text}
            parser.add_argument(name, default=argparse.SUPPRESS, **action)


class SetVariable(argparse.Action):
    """Sets the environment variable that ``const`` names to 1."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        os.environ[str(self.const)] = "1"


def is_trusted(overrides: Mapping[str, Any]) -> bool:
    """Return whether the caller trusts a checkpoint's configuration.

    Args:
        overrides: options that the caller gives.
    """
    return bool(overrides.get(OVERRIDE) or os.environ.get(TRUST))


def read_checkpoint(path: str, *, verify: bool = True, mapped: bool = False) -> dict[str, Any]:
    """Read a fairseq checkpoint.

    Args:
        path: the file. For a sharded checkpoint, the file that names the folder of the shards.
        verify, mapped: see :func:`.reading.read_file`.

    Raises:
        UsageError: the file cannot be read, or is not a fairseq checkpoint.
    """
    state = read_file(path, verify=verify, mapped=mapped)
    check_structure(state, path)
    check_fingerprints(state, path)
    rename(state)
    return state


def fresh_copy(path: str, load_on_all_ranks: bool) -> str:
    """Return the local path of a file, as fairseq does.

    A remote file is copied again, also if there is a copy.

    Args:
        path: path or URL of the file.
        load_on_all_ranks: whether all ranks call this function together.
    """
    local = PathManager.get_local_path(path)
    if local != path and PathManager.path_requires_pathmanager(path):
        if os.path.exists(local):
            os.remove(local)
        if load_on_all_ranks:
            torch.distributed.barrier()
        local = PathManager.get_local_path(path)
    return local


def upgraded(state: dict[str, Any], path: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint of any version of fairseq to the current version.

    Args:
        state: content of the checkpoint.
        path: the file, for the message.
        overrides: options of the caller, which replace stored ones.

    Raises:
        UsageError: the content belongs to no version of fairseq.
    """
    if state.get("args") is not None:
        vars(state["args"]).update(overrides)
    if state.get("cfg") is not None:
        # An encoder-decoder model's options are a Namespace.
        state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        overwrite_args_by_name(state["cfg"], overrides)
    try:
        return checkpoint_utils._upgrade_state_dict(state)
    except KeyError as error:
        raise UsageError(
            f"checkpoint {path}: not a checkpoint of fairseq: it has no {error}"
        ) from error


def fingerprints(model: Mapping[str, Any], in_parts: bool) -> dict[str, str]:
    """Return the fingerprints to store in a checkpoint, by which a later change is detected.

    Args:
        model: name -> parameter or buffer in this file.
        in_parts: whether other files hold the rest.

    Returns:
        ``integers``: fingerprint of the integer and boolean buffers, which a program that averages
        checkpoints would destroy. With ``in_parts`` also ``fingerprint``: fingerprint of all
        tensors, which must not change without the other files.
    """
    result = {"integers": fingerprint(model, is_not_averaged)}
    return result | ({"fingerprint": fingerprint(model)} if in_parts else {})


def check_fingerprints(state: Mapping[str, Any], path: str) -> None:
    """Compare the parameters of a checkpoint with its stored fingerprints.

    Raises:
        UsageError: integer buffers were changed, or a sharded checkpoint was changed without its
            shards.
    """
    saved = state.get(KEY, {})
    advice = "average checkpoints with fairseq-sffn average"
    if "fingerprint" in saved and saved["fingerprint"] != fingerprint(state["model"]):
        raise UsageError(
            f"checkpoint {path}: was changed after it was written, and its parts in "
            f"{saved.get('folder')} were not; {advice}"
        )
    if "integers" in saved and saved["integers"] != fingerprint(state["model"], is_not_averaged):
        raise UsageError(
            f"checkpoint {path}: its integer buffers, such as hash tables, were changed after it "
            f"was written; {advice}"
        )
