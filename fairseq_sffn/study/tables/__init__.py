"""A study's tables: a module for each kind."""

from __future__ import annotations

from collections.abc import Callable

from ..outcomes import Study
from ..plan import Table
from .balance import balance
from .part import Parts
from .perplexity import perplexity
from .routing import routing
from .taxonomy import taxonomy
from .zero_shot import zero_shot

KINDS: dict[str, Callable[[Study, Table], Parts]] = {
    "taxonomy": taxonomy,
    "perplexity": perplexity,
    "balance": balance,
    "zero_shot": zero_shot,
    "routing": routing,
}
"""Kind of a table -> what renders it."""
