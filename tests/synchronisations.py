"""Finds where the host would wait for an accelerator, on a machine without one.

A value that the host reads, a size that depends on values, and a copy from the host's memory all
wait. :class:`Synchronisations` notes them over tensors on a CPU, where they cost nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[1] / "fairseq_sffn"
TORCH = Path(torch.__file__).parent

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "argwhere"}
"""Operations whose result the host needs, or whose size it does."""

MASKABLE = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}

COPIES_TO_HOST = {"tolist", "numpy", "__array__", "cpu", "item"}
COPIES_TO_DEVICE = {"tensor", "new_tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"}


class Synchronisations:
    """While open, counts what would wait for an accelerator, by place: ``file:line operation``.

    Places are in this package, or are ``backward`` where autograd's own nodes wait.

    Args:
        leave_out: folders of the package whose places do not count.
    """

    def __init__(self, *leave_out: str) -> None:
        self.leave_out, self.places = leave_out, Counter[str]()
        self.modes = _Functions(self), _Operations(self)

    def __enter__(self) -> Counter[str]:
        for mode in self.modes:
            mode.__enter__()
        return self.places

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def note(self, operation: str) -> None:
        file, line = _caller()
        if not file.startswith(self.leave_out):
            self.places[f"{file}:{line} {operation}" if file else f"backward {operation}"] += 1


class _Functions(TorchFunctionMode):
    """Notes copies between the host and a device, which on a CPU are no operations."""

    def __init__(self, found: Synchronisations) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in COPIES_TO_HOST - {"item"} or name in COPIES_TO_DEVICE:
            self.found.note(name)
        elif name == "to" and not kwargs.get("non_blocking"):
            targets = [*args[1:], *kwargs.values()]
            if any(isinstance(target, torch.device | str | torch.Tensor) for target in targets):
                self.found.note(name)
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Notes operations that read values, in the forward and the backward pass."""

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
    """File in the package, and line, that called PyTorch; an empty name where none did."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix(), frame.f_lineno
        frame = frame.f_back
    return "", 0
