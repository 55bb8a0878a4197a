"""Check that a command can compute in half precision."""

from typing import Any

import torch

from .errors import UsageError


def check_precision(common: Any, flags: tuple[str, ...]) -> None:
    """Refuse half precision where a command runs on the CPU.

    Args:
        common: fairseq's common options.
        flags: names of the options to look at, of ``fp16``, ``bf16`` and ``amp``.

    Raises:
        UsageError: one of the options is set and there is no GPU to use.
    """
    if common.cpu or not torch.cuda.is_available():
        for flag in flags:
            if getattr(common, flag):
                thrifty = getattr(common, f"memory_efficient_{flag}", False)
                name = f"memory-efficient-{flag}" if thrifty else flag
                raise UsageError(f"--{name}: needs a GPU, and this command runs on the CPU")
