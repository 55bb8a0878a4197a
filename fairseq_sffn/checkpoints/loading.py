"""fairseq's loading functions: nothing that a checkpoint holds is evaluated, imported or opened."""

from __future__ import annotations

import argparse
import functools
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from ..compat import replace_once
from ..errors import UsageError
from .integrity import fingerprint, is_not_averaged
from .reading import SKIP_CHECKSUMS, DamagedCheckpoint, read_file
from .stored_configuration import safe_state
from .structure import AVERAGED, check_structure, find_problem

KEY = "sffn"
"""Entry of a checkpoint for what the plugin keeps there; see :mod:`.structure`."""
TRUST = "FAIRSEQ_SFFN_TRUST_CHECKPOINT"
"""Environment variable that ``--trust-checkpoint`` sets."""
OVERRIDE = "trust_checkpoint"
"""The same among the overrides that Python callers give."""
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

_trainer: ContextVar[Trainer | None] = ContextVar("trainer", default=None)
"""What goes on training from the checkpoint that is loaded."""
_checked: ContextVar[frozenset[str]] = ContextVar("checked", default=frozenset())


def apply() -> None:
    """Apply every patch."""
    load_safely()
    load_averages_safely()
    load_no_folder_of_a_checkpoint()
    train_without_its_configuration()


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


def load_safely() -> None:
    """Replace ``load_checkpoint_to_cpu``, which unpickles what
    ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` lets it, and passes any configuration on. Can go when
    fairseq does neither."""

    @functools.wraps(checkpoint_utils.load_checkpoint_to_cpu)
    def load_checkpoint_to_cpu(
        path: str,
        arg_overrides: Mapping[str, Any] | None = None,
        load_on_all_ranks: bool = False,
    ) -> dict[str, Any]:
        state = read_checkpoint(fresh_copy(path, load_on_all_ranks), verify=not is_checked(path))
        overrides = dict(arg_overrides or {})
        trusted = overrides.pop(OVERRIDE, False) or os.environ.get(TRUST)
        if (trainer := _trainer.get()) is not None:
            state["cfg"] = state["args"] = None  # for which training has no use
            if trainer.cfg.ema.store_ema:
                # fairseq begins an average from parameters that it has deleted by then.
                state["extra_state"].setdefault("ema", dict(state["model"]))
        elif state.get("cfg") is None and state.get("args") is None:
            raise UsageError(f"checkpoint {path}: has no configuration, neither 'cfg' nor 'args'")
        elif not trusted:
            safe_state(state, path, overrides)
        return upgraded(state, path, overrides)

    replace_once(checkpoint_utils, "load_checkpoint_to_cpu", load_checkpoint_to_cpu)


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


def load_averages_safely() -> None:
    """``load_ema_from_checkpoint`` unpickles in the same way. Looks at the file first. Can go when
    fairseq passes ``weights_only=True``."""

    @functools.wraps(checkpoint_utils.load_ema_from_checkpoint)
    def load_ema_from_checkpoint(fpath: str) -> Any:
        local = PathManager.get_local_path(fpath)
        if os.path.isfile(local) and find_problem(read_file(local, mapped=True), AVERAGED):
            raise UsageError(
                f"checkpoint {fpath}: holds no moving average: it was trained without --store-ema"
            )
        try:
            return original(fpath)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"checkpoint {fpath}: there is no such file") from error

    original = checkpoint_utils.load_ema_from_checkpoint
    replace_once(checkpoint_utils, "load_ema_from_checkpoint", load_ema_from_checkpoint)


def load_no_folder_of_a_checkpoint() -> None:
    """fairseq opens the data folder that a checkpoint names if the caller names none. Asks for one,
    and says in a line what fairseq says in a traceback."""

    @functools.wraps(checkpoint_utils.load_model_ensemble_and_task)
    def load_model_ensemble_and_task(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        overrides = given["arg_overrides"] or {}
        # A suffix or shards make other names of these.
        if given["state"] is None and not given["suffix"] and given["num_shards"] == 1:
            for path in given["filenames"]:
                if not PathManager.isfile(path):
                    raise DamagedCheckpoint(f"checkpoint {path}: there is no such file")
        trusted = overrides.get(OVERRIDE) or os.environ.get(TRUST)
        names_data = "data" in overrides or "data" in (overrides.get("task") or {})
        if given["task"] is None and given["state"] is None and not (trusted or names_data):
            raise UsageError(
                f"checkpoint {', '.join(given['filenames'])}: give "
                "arg_overrides={'data': FOLDER} with its dict.txt; the folder that a checkpoint "
                "names is opened only with arg_overrides={'trust_checkpoint': True}"
            )
        return original(*args, **kwargs)

    original = checkpoint_utils.load_model_ensemble_and_task
    signature = inspect.signature(original)
    replace_once(checkpoint_utils, "load_model_ensemble_and_task", load_model_ensemble_and_task)


def train_without_its_configuration() -> None:
    """A training that goes on from a checkpoint has its own configuration. What the stored one says
    is then not even looked at, so that any model may be trained. fairseq says in a traceback what
    does not fit."""

    @functools.wraps(Trainer.load_checkpoint)
    def load_checkpoint(self: Trainer, filename: str, *args: Any, **kwargs: Any) -> Any:
        with set_for_now(_trainer, self):
            try:
                return original(self, filename, *args, **kwargs)
            except Exception as error:
                if not is_about_content(error):
                    raise
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UsageError(
                    f"checkpoint {filename}: training cannot go on from it: {reason}"
                ) from error

    original = Trainer.load_checkpoint
    replace_once(Trainer, "load_checkpoint", load_checkpoint)


def is_about_content(error: Exception) -> bool:
    """Return whether fairseq fails because of what a checkpoint holds, not because of the machine
    or another process."""
    odd = (AssertionError, AttributeError, LookupError, TypeError, ValueError)
    return isinstance(error, odd) or type(error) is Exception


def is_checked(path: str | Path) -> bool:
    """Return whether :func:`already_checked` names a file."""
    return os.path.realpath(path) in _checked.get()


def already_checked(paths: Iterable[str | Path]) -> AbstractContextManager[None]:
    """Return a context in which files are not compared with their checksums again."""
    return set_for_now(_checked, _checked.get() | {os.path.realpath(path) for path in paths})


@contextmanager
def set_for_now(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """A context in which a variable has a value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


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
