"""The configurations that fairseq's functions are called with.

Python callers may give an ``argparse.Namespace`` to fairseq's commands and to its trainer.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq_cli import eval_lm, generate, interactive, train, validate
from omegaconf import OmegaConf, open_dict

from .compat import replace_once


def apply() -> None:
    """Apply every repair. Call it after those of other modules, whose wrappers it goes around."""
    convert_namespaces_first()


def convert_namespaces_first() -> None:
    """fairseq converts an ``argparse.Namespace`` when its function begins, after the plugin's
    wrappers have read it. Converts it before them. Can go when no wrapper reads a configuration."""

    def converting(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            call.arguments["cfg"] = as_configuration(call.arguments["cfg"])
            return original(*call.args, **call.kwargs)

        return function

    commands = (train, eval_lm, generate, interactive, validate)
    targets = [(command, "main") for command in commands]
    for owner, name in (*targets, (distributed_utils, "distributed_init")):
        replace_once(owner, name, converting(getattr(owner, name)))


def as_configuration(cfg: Any) -> Any:
    """Convert an ``argparse.Namespace`` as fairseq does, and return anything else unchanged."""
    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, argparse.Namespace) else cfg


def writable(options: Any) -> AbstractContextManager[Any]:
    """Allow new options in a configuration while open; a namespace always allows them."""
    return open_dict(options) if OmegaConf.is_config(options) else nullcontext()
