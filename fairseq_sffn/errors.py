"""The error that ends a command, and how options are named in it."""

from collections.abc import Sequence
from typing import Any


class UsageError(SystemExit):
    """Ends the command with one line on stderr and exit status 1.

    It is a ``SystemExit``, so that no traceback hides the line and fairseq's ``except Exception``
    clauses do not replace it.
    """


def flag(name: str) -> str:
    """Return the command-line flag of an option."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """Return a value as it is given on a command line."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(map(str, value))
    return str(value) or "''"
