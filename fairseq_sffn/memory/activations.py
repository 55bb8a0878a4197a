"""The activation functions that a configuration may name."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": F.tanh,
}

GATED = ("silu", "gelu")
"""Activation functions of gated cells: SwiGLU and GEGLU (Shazeer 2020, arXiv 2002.05202)."""
