"""Check of the numerical precision that a command asks for."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UsageError


def check_precision(common: Any, flags: tuple[str, ...]) -> None:
    """Raise UsageError where one of some flags is given without a GPU.

    Args:
        common: options that every command has.
        flags: names of the options, for example ``fp16``.
    """
    if common.cpu or not torch.cuda.is_available():
        for flag in flags:
            if getattr(common, flag):
                thrifty = getattr(common, f"memory_efficient_{flag}", False)
                name = f"memory-efficient-{flag}" if thrifty else flag
                raise UsageError(f"--{name}: needs a GPU, and this command runs on the CPU")
