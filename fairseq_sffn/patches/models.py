"""Patch of the function with which fairseq builds models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..options.configuration import writable
from ..options.model import check_model
from .registry import NEEDED, patch


@patch(
    "fairseq.models:build_model",
    why="A loaded model would need as many processes as in training. Options that replace those of "
    "a checkpoint are not checked.",
    until="fairseq checks a model's options, and tells a model that it is loaded for use.",
    kind=NEEDED,
    written_for=("03d906bb",),
)
def build_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check a model's options, and load a model with all of its blocks.

    A loaded model does not exchange tokens with other processes.
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
