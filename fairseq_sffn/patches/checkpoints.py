"""Patches of fairseq's functions that read and write checkpoints."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fairseq.file_io import PathManager

from ..checkpoints.loading import OVERRIDE, fresh_copy, is_trusted, read_checkpoint, upgraded
from ..checkpoints.reading import DamagedCheckpoint, read_file
from ..checkpoints.resuming import LAST, check_named, choose_together, is_local, restoring
from ..checkpoints.structure import AVERAGED, find_problem
from ..checkpoints.writing import copy_checkpoint, in_background
from ..errors import UsageError
from ..expert_parallel.gradients import expert_parallel_of
from ..expert_parallel.parts import Part, put_parts
from ..expert_parallel.saving import remove_unnamed
from .registry import MENDS_FAIRSEQ, NEEDED, patch
from .stored_configuration import safe_state
from .trainer import SFFNTrainer
from .trainer_checkpoints import loading_for


@patch(
    "fairseq.checkpoint_utils:load_checkpoint_to_cpu",
    why="With TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, fairseq unpickles any code. It accepts any stored "
    "configuration, and cannot read sharded checkpoints.",
    until="fairseq lets a plugin read checkpoints.",
    kind=NEEDED,
    written_for=("c4a2a1aa",),
)
def load_checkpoint_to_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """Read and check a checkpoint without running its content, and add this process's parts."""

    @functools.wraps(original)
    def wrapper(
        path: str,
        arg_overrides: Mapping[str, Any] | None = None,
        load_on_all_ranks: bool = False,
    ) -> dict[str, Any]:
        wanted = loading_for.get()
        verified = frozenset() if wanted is None else wanted.verified
        local = fresh_copy(path, load_on_all_ranks)
        state = read_checkpoint(local, verify=os.path.realpath(path) not in verified)
        overrides = dict(arg_overrides or {})
        trusted = is_trusted(overrides)
        overrides.pop(OVERRIDE, None)
        if wanted is not None:
            state["cfg"] = state["args"] = None  # training has its own configuration
            if wanted.average:
                # Without a stored average, fairseq starts one from parameters that it has deleted.
                state["extra_state"].setdefault("ema", dict(state["model"]))
        elif state.get("cfg") is None and state.get("args") is None:
            raise UsageError(f"checkpoint {path}: has no configuration, neither 'cfg' nor 'args'")
        elif not trusted:
            safe_state(state, path, overrides)
        state = upgraded(state, path, overrides)
        part = Part() if wanted is None else wanted.part
        put_parts(state, Path(PathManager.get_local_path(path)), part, verified)
        return state

    return wrapper


@patch(
    "fairseq.checkpoint_utils:load_checkpoint",
    why="fairseq silently starts over if checkpoint_last.pt is missing or --restore-file names no "
    "file.",
    until="fairseq resumes from the newest whole checkpoint.",
    kind=MENDS_FAIRSEQ,
    written_for=("13c32e20",),
)
def load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Resume from the newest whole checkpoint, and refuse files that do not exist."""

    @functools.wraps(original)
    def wrapper(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        if trainer.checkpoint_suffix or not cfg.save_dir or not is_local(cfg):
            return original(cfg, trainer, **kwargs)
        if cfg.finetune_from_model and not os.path.isfile(cfg.finetune_from_model):
            raise UsageError(
                f"--finetune-from-model {cfg.finetune_from_model}: there is no such file"
            )
        if cfg.restore_file != LAST:
            check_named(cfg)
            return original(cfg, trainer, **kwargs)
        newest, files = choose_together(Path(cfg.save_dir))
        if newest is not None and newest.name == LAST:
            newest = None  # fairseq's own choice
        trainer.verified = frozenset(map(os.path.realpath, files))
        try:
            with restoring(cfg, newest):
                return original(cfg, trainer, **kwargs)
        finally:
            trainer.verified = frozenset()

    return wrapper


@patch(
    "fairseq.checkpoint_utils:save_checkpoint",
    why="fairseq saves the blocks of one rank only. It ends in a traceback if --save-dir is gone "
    "or read-only.",
    until="fairseq lets each rank save, and names the flag and the reason.",
    kind=NEEDED,
    written_for=("d31b0a2a",),
)
def save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Save the parts of all ranks, also in the background, and report errors in one line."""

    @functools.wraps(original)
    def wrapper(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        def save() -> Any:
            try:
                return original(cfg, trainer, *args, **kwargs)
            except OSError as error:
                raise UsageError(
                    f"--save-dir {cfg.save_dir}: cannot be written to at update "
                    f"{trainer.get_num_updates()}: {error.strerror or error}: {error.filename}"
                ) from error

        if not isinstance(trainer, SFFNTrainer):  # made before the plugin was imported
            return save()
        if trainer.writer is not None:
            trainer.writer.wait()  # so that at most one copy of the state takes memory
        with in_background(trainer.writer):
            if not cfg.no_save and expert_parallel_of(trainer.get_model()) > 1:
                saved = trainer.save_with_parts(cfg, save)
            else:
                saved = save()
                if cfg.save_dir and not cfg.no_save and trainer.is_data_parallel_master:
                    remove_unnamed(Path(cfg.save_dir))  # left by sharded training
        if trainer.interruption is not None:
            trainer.interruption.saved = True
        return saved

    return wrapper


@patch(
    "fairseq.checkpoint_utils:load_model_ensemble_and_task",
    why="fairseq opens the data folder that a checkpoint names if the caller names none. It ends "
    "in a traceback if a file is missing.",
    until="fairseq requires the folder from the caller.",
    kind=MENDS_FAIRSEQ,
    written_for=("66d41954",),
)
def load_model_ensemble_and_task(original: Callable[..., Any]) -> Callable[..., Any]:
    """Require the data folder from the caller, and refuse files that do not exist."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        overrides = given["arg_overrides"] or {}
        # With a suffix or shards, the files have other names.
        if given["state"] is None and not given["suffix"] and given["num_shards"] == 1:
            for path in given["filenames"]:
                if not PathManager.isfile(path):
                    raise DamagedCheckpoint(f"checkpoint {path}: there is no such file")
        names_data = "data" in overrides or "data" in (overrides.get("task") or {})
        known = names_data or is_trusted(overrides)
        if given["task"] is None and given["state"] is None and not known:
            raise UsageError(
                f"checkpoint {', '.join(given['filenames'])}: give "
                "arg_overrides={'data': FOLDER} with its dict.txt; the folder that a checkpoint "
                "names is opened only with arg_overrides={'trust_checkpoint': True}"
            )
        return original(*args, **kwargs)

    return wrapper


@patch(
    "fairseq.checkpoint_utils:load_ema_from_checkpoint",
    why="With TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, fairseq unpickles any code.",
    until="fairseq passes weights_only=True.",
    kind=MENDS_FAIRSEQ,
    written_for=("9e7f7ee4",),
)
def load_ema_from_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check that the file is a checkpoint with a moving average before fairseq reads it."""

    @functools.wraps(original)
    def wrapper(fpath: str) -> Any:
        local = PathManager.get_local_path(fpath)
        if os.path.isfile(local) and find_problem(read_file(local, mapped=True), AVERAGED):
            raise UsageError(
                f"checkpoint {fpath}: holds no moving average: it was trained without --store-ema"
            )
        try:
            return original(fpath)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"checkpoint {fpath}: there is no such file") from error

    return wrapper


@patch(
    "fairseq.file_io:PathManager.copy",
    why="fairseq copies a checkpoint over checkpoint_last.pt in place. If it is killed meanwhile, "
    "no checkpoint is left to resume from.",
    until="PathManager.copy is atomic.",
    kind=MENDS_FAIRSEQ,
    written_for=("948b6772",),
)
def copy(original: Callable[..., bool]) -> Callable[..., bool]:
    """Copy a local file whole or not at all."""

    @functools.wraps(original)
    def wrapper(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if PathManager.path_requires_pathmanager(str(dst_path)):
            return original(src_path, dst_path, overwrite)
        copy_checkpoint(src_path, dst_path)
        return True

    return wrapper
