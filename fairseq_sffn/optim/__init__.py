"""Optimizers, and the moving average of ``--store-ema``."""

from . import sffn_adam

__all__ = ["sffn_adam"]
