"""Splits words, and remembers the pieces of some."""

from __future__ import annotations

import functools
from typing import Any

CACHED_WORDS = 2**16
"""Number of words whose pieces are remembered."""


class Splitter:
    """Splits words, and remembers the pieces of some. Copies and pickles remember none."""

    def _split(self, word: str) -> list[str]:
        raise NotImplementedError

    def _remember(self) -> None:
        self._split_word = functools.lru_cache(CACHED_WORDS)(self._split)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_split_word"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()
