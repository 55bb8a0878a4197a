"""Sparse neural memories in plain PyTorch.

A memory has large key and value tables, of which each token uses a few blocks (Liu et al. 2023,
arXiv 2305.13999). README.md in this folder explains use and extension. The package needs PyTorch
and NumPy only.

Suffixes of tensor names give their shape:

    N  tokens                          C  cells of a table
    D  width                           B  blocks
    T  context: trailing token ids     G  cells per block
    A  active blocks of a token        K  active cells of a token, A * G
    P  assignments (token, block): N * A, without dropped ones where they are removed
    H  heads                           L, R  sub-keys of the two halves of product keys
    V  vocabulary

A lower-case letter is a part of the upper-case one: ``rows_pD`` has some of the P assignments.
``compute/`` also has S boundaries of blocks, T tiles, M rows of a tile, and X and Y for any size;
``dispatch.py`` has M ranks, Q received assignments, and R rows sent or received.
"""

from . import selectors
from .config import MemoryConfig
from .process_groups import ProcessGroups
from .product_scores import ProductScores
from .scores import Scores
from .selection import Selection, Selector, SelectorConfig, SelectorInput
from .sparse_memory import MemoryOutput, SparseMemory
from .usage import Usage
from .validation import ConfigError

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
