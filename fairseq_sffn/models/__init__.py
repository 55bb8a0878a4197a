"""Transformer language models with sparse feed-forward layers."""

from . import transformer_lm

__all__ = ["transformer_lm"]
