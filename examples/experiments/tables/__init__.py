"""The tables of reports: a function for each kind."""

from __future__ import annotations

from collections.abc import Callable

from ..files import Table
from ..outcomes import Experiments
from .part import Parts
from .perplexity import balance, perplexity
from .routing import routing
from .taxonomy import taxonomy
from .zero_shot import zero_shot

KINDS: dict[str, Callable[[Experiments, Table], Parts]] = {
    "taxonomy": taxonomy,
    "perplexity": perplexity,
    "balance": balance,
    "zero_shot": zero_shot,
    "routing": routing,
}
"""Kind of a table -> the function that makes its parts."""
