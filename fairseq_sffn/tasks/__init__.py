"""The task ``sffn_language_modeling``."""

from . import sffn_language_modeling

__all__ = ["sffn_language_modeling"]
