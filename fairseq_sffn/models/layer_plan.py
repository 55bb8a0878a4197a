"""Which layers of an encoder or a decoder are sparse, and their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerGroup:
    """Sparse layers with the same options.

    Attributes:
        numbers: numbers of the layers, from 0. A pruned model keeps the numbers of training.
        options: the model's options, as they hold for these layers.
    """

    numbers: range
    options: Any

    @property
    def count(self) -> int:
        """Number of layers, which may be too large for ``len``."""
        numbers = self.numbers
        return max(0, (numbers.stop - numbers.start + numbers.step - 1) // numbers.step)


def layer_groups(args: Any, side: str) -> list[LayerGroup]:
    """Return the sparse layers of a side, before any are pruned.

    Args:
        args: the model's options.
        side: ``encoder`` or ``decoder``.
    """
    freq, layers = args.sffn_freq, getattr(args, f"{side}_layers")
    return [LayerGroup(range(freq - 1, layers, freq), args)]
