"""Optimizers."""

from . import sffn_adam

__all__ = ["sffn_adam"]
