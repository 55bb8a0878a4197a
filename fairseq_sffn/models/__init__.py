"""Transformers with sparse feed-forward layers."""

from . import transformer, transformer_lm

__all__ = ["transformer", "transformer_lm"]
