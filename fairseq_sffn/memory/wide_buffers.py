"""Modules whose buffers keep single precision."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

Self = TypeVar("Self", bound="WideBuffers")


class WideBuffers(nn.Module):
    """A module whose own floating-point buffers stay in fp32 at least in a half-precision model.

    Half precision would lose small steps and overflow on large sums.
    """

    def _apply(self: Self, *args: Any, **kwargs: Any) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(*args, **kwargs)
        for name, buffer in self.named_buffers(recurse=False):
            wide = torch.promote_types(buffer.dtype, torch.float32)
            if buffer.is_floating_point() and buffer.dtype != wide:
                setattr(self, name, before[name].to(buffer.device, wide))
        return self
