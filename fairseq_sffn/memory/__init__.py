"""Sparse neural memories in plain PyTorch: large key and value tables of which a token uses a few
blocks (Liu et al. 2023, arXiv 2305.13999). Nothing here needs fairseq."""

from . import selectors
from .config import ConfigError, MemoryConfig
from .exchange import ProcessGroups
from .scores import ProductScores, Scores
from .selection import Selection, Selector, SelectorConfig, SelectorInput
from .sparse_memory import MemoryOutput, SparseMemory
from .usage import Usage

__all__ = [
    "ConfigError",
    "MemoryConfig",
    "MemoryOutput",
    "ProcessGroups",
    "ProductScores",
    "Scores",
    "Selection",
    "Selector",
    "SelectorConfig",
    "SelectorInput",
    "SparseMemory",
    "Usage",
    "selectors",
]
