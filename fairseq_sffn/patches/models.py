"""How fairseq builds models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..options.configuration import writable
from ..options.model import check_model
from .registry import NEEDED, patch


@patch(
    "fairseq.models:build_model",
    why="A model that is loaded to be used would ask for as many processes as trained it, and "
    "options that replace a checkpoint's are not checked.",
    until="fairseq checks a model's options, and tells a model that it is loaded to be used.",
    kind=NEEDED,
    written_for=("03d906bb",),
)
def build_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check a model's options, and load a model with all its blocks.

    A model that is loaded to be used does not look at the tokens of other processes.
    """

    @functools.wraps(original)
    def wrapper(cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
        check_model(cfg, task)
        if not from_checkpoint or not hasattr(cfg, "sffn_expert_parallel"):
            return original(cfg, task, from_checkpoint)
        with writable(cfg):
            cfg.sffn_expert_parallel = 1
        model = original(cfg, task, from_checkpoint)
        model.work_alone()
        return model

    return wrapper
