"""Finds where the host would wait for an accelerator, on a machine without one.

The host waits when it reads a value, when a size depends on values, and when data is copied from
the host's memory. :class:`Synchronisations` records these operations on CPU tensors, where they
cost nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import fairseq
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

FOLDERS = {
    "": Path(__file__).parents[1] / "fairseq_sffn",
    "fairseq/": Path(fairseq.__file__).parent,
}
"""First part of a place's name -> folder of its files."""

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "argwhere"}
"""Operations whose result or size the host needs."""

MASKABLE = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}

COPIES = {
    torch.Tensor: ("tolist", "numpy", "__array__", "cpu", "to", "new_tensor"),
    torch: ("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"),
}
"""Owner -> functions that copy between the host and a device. On a CPU they start no operation."""


class Synchronisations:
    """Counts operations that would wait for an accelerator, by place: ``file:line operation``.

    It counts while its context is open. Places are in this package or in fairseq; the latter begin
    with ``fairseq/``. A place is ``backward`` if autograd's own nodes wait.

    Args:
        leave_out: folders of the package whose places do not count.
    """

    def __init__(self, *leave_out: str) -> None:
        self.leave_out, self.places = leave_out, Counter[str]()
        self.open = ExitStack()

    def __enter__(self) -> Counter[str]:
        for owner, names in COPIES.items():
            for name in names:
                copy = self.noting(name, getattr(owner, name))
                self.open.enter_context(mock.patch.object(owner, name, copy))
        self.open.enter_context(_Operations(self))
        return self.places

    def __exit__(self, *error: Any) -> None:
        self.open.close()

    def noting(self, name: str, function: Any) -> Any:
        """Wrap a function so that each call is recorded, unless it only changes a dtype or does not
        wait."""

        def call(*args: Any, **kwargs: Any) -> Any:
            targets = [*args[1:], *kwargs.values()]
            moves = any(isinstance(target, torch.device | str) for target in targets)
            if name != "to" or (moves and not kwargs.get("non_blocking")):
                self.note(name)
            return function(*args, **kwargs)

        return call

    def note(self, operation: str) -> None:
        file, line = _caller()
        if not file.startswith(self.leave_out):
            self.places[f"{file}:{line} {operation}" if file else f"backward {operation}"] += 1


def operations(places: Counter[str]) -> list[str]:
    """Return the names of the waiting operations, as often as they wait."""
    return sorted(place.partition(" ")[2] for place in places.elements())


class _Operations(TorchDispatchMode):
    """Records operations that read values, in the forward and the backward pass."""

    def __init__(self, found: Synchronisations) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        sized = kwargs.get("output_size") is not None
        masks = (torch.bool, torch.uint8)
        if name in READS or (name == "repeat_interleave" and not sized):
            self.found.note(name)
        elif name in MASKABLE and any(
            isinstance(index, torch.Tensor) and index.dtype in masks
            for index in _pytree.tree_leaves(args[1])
        ):
            self.found.note(f"{name} by a mask")
        return function(*args, **kwargs)


def _caller() -> tuple[str, int]:
    """Return the file and line that called PyTorch. The name is empty if the caller is in none of
    the folders."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for start, folder in FOLDERS.items():
            if path.is_relative_to(folder):
                return start + path.relative_to(folder).as_posix(), frame.f_lineno
        frame = frame.f_back
    return "", 0
