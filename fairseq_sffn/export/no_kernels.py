"""Takes the place of the C++ kernels in an exported folder: stock PyTorch computes everything."""

from __future__ import annotations

import os
from typing import Any

import torch

SWITCH = "FAIRSEQ_SFFN_KERNELS"


def load() -> Any:
    """Return ``None``: there are no kernels."""
    return None


def wanted() -> bool:
    """Return whether the environment allows Triton in place of stock PyTorch."""
    return os.environ.get(SWITCH, "").lower() not in ("off", "0")


def supported(dtype: torch.dtype) -> bool:
    """Return ``False``: the kernels can compute no dtype."""
    return False
