"""Patch of NumPy 2 for fairseq."""

from __future__ import annotations

import types
from typing import Any

from .registry import MENDS_FAIRSEQ, MISSING, patch


@patch(
    "numpy:compat",
    why="NumPy 2 has no np.compat.long, which TokenBlockDataset uses (--sample-break-mode eos, "
    "generation).",
    until="fairseq does not use np.compat.long.",
    kind=MENDS_FAIRSEQ,
    written_for=(MISSING,),
)
def compat(original: Any) -> Any:
    """Add ``np.compat.long`` if it is missing."""
    return types.SimpleNamespace(long=int) if original is None else original
