"""Reading a checkpoint of fairseq: nothing that it holds is evaluated, imported or opened."""

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
from .reading import SKIP_CHECKSUMS, read_file
from .structure import check_structure

KEY = "sffn"
"""Entry of a checkpoint for what the plugin keeps there; see :mod:`.structure`."""
TRUST = "FAIRSEQ_SFFN_TRUST_CHECKPOINT"
"""Environment variable that ``--trust-checkpoint`` sets."""
OVERRIDE = "trust_checkpoint"
"""Name of the same switch among the overrides that Python callers give."""
FLAGS = {
    "--trust-checkpoint": (
        TRUST,
        "use a checkpoint's configuration as it is, even if it names models, tasks or files that "
        "fairseq_sffn does not know: it can then run any code",
    ),
    "--skip-checksums": (
        SKIP_CHECKSUMS,
        "do not compare checkpoints with their checksums (half a second a gigabyte)",
    ),
}
"""Flag of every command that loads a checkpoint -> its environment variable, which the processes
that fairseq starts inherit, and its help."""


def add_flags_to(parser: Any, *variables: str) -> None:
    """Add the flags to a parser, or to a group of it.

    Args:
        parser: gets the flags.
        variables: environment variables of those to add; all, if none is given.
    """
    for name, (variable, text) in FLAGS.items():
        if variable in (variables or (TRUST, SKIP_CHECKSUMS)):
            action = {"action": SetVariable, "const": variable, "nargs": 0, "help": text}
            parser.add_argument(name, default=argparse.SUPPRESS, **action)


class SetVariable(argparse.Action):
    """Sets the environment variable that ``const`` names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        os.environ[str(self.const)] = "1"


def is_trusted(overrides: Mapping[str, Any]) -> bool:
    """Return whether the caller trusts a checkpoint's configuration.

    Args:
        overrides: options that the caller gives.
    """
    return bool(overrides.get(OVERRIDE) or os.environ.get(TRUST))


def read_checkpoint(path: str, *, verify: bool = True, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint of fairseq; of one in several files, the one that names the others.

    Args:
        path: the file.
        verify, mapped: as for :func:`.reading.read_file`.

    Raises:
        UsageError: it cannot be read, or is not a checkpoint of fairseq.
    """
    state = read_file(path, verify=verify, mapped=mapped)
    check_structure(state, path)
    check_fingerprints(state, path)
    return state


def fresh_copy(path: str, load_on_all_ranks: bool) -> str:
    """Return where a file lies on this machine; of one that lies elsewhere, a copy made now, as
    fairseq has it."""
    local = PathManager.get_local_path(path)
    if local != path and PathManager.path_requires_pathmanager(path):
        if os.path.exists(local):
            os.remove(local)
        if load_on_all_ranks:
            torch.distributed.barrier()
        local = PathManager.get_local_path(path)
    return local


def upgraded(state: dict[str, Any], path: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of any version of fairseq as today's, with options that the caller gives.

    Raises:
        UsageError: it is of no version.
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
    """Return what is stored of a checkpoint's parameters, so that an edit is noticed.

    Args:
        model: name -> parameter or buffer, in this file.
        in_parts: other files have the rest.

    Returns:
        ``integers`` of the integer and boolean buffers, which a program that averages would ruin;
        ``fingerprint`` of all, where an edit of this file leaves the other files behind.
    """
    result = {"integers": fingerprint(model, is_not_averaged)}
    return result | ({"fingerprint": fingerprint(model)} if in_parts else {})


def check_fingerprints(state: Mapping[str, Any], path: str) -> None:
    """Raise UsageError where parameters were changed that must not be, or not alone."""
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
