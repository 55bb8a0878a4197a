"""Converts the ``argparse.Namespace`` that a trainer is called with."""

from __future__ import annotations

import functools
from typing import Any

from fairseq.trainer import Trainer

from .compat import replace_once
from .options.configuration import as_configuration


def apply() -> None:
    """Apply every repair."""
    convert_namespaces_first()


def convert_namespaces_first() -> None:
    """Convert before other wrappers of ``Trainer.__init__`` read the configuration."""

    @functools.wraps(Trainer.__init__)
    def __init__(self: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
        original(self, as_configuration(cfg), *args, **kwargs)

    original = Trainer.__init__
    replace_once(Trainer, "__init__", __init__)
