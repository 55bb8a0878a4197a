"""Transformers with sparse feed-forward layers. :mod:`.decoder` describes the path of a token."""

from . import transformer, transformer_lm

__all__ = ["transformer", "transformer_lm"]
