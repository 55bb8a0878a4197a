"""How long the processes of a training wait for each other."""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

from ..errors import UsageError

PEER_TIMEOUT = "--peer-timeout"
"""Flag of fairseq's commands."""
VARIABLE = "FAIRSEQ_SFFN_PEER_TIMEOUT"
"""Environment variable that the flag sets. Processes that fairseq starts inherit it."""
DEFAULT_SECONDS = 120
HELP = (
    "seconds without a sign of life after which another process counts as lost, and for which a "
    "process waits for the files of another one in --save-dir; 0: watches no process and waits for "
    f"no file (default: {DEFAULT_SECONDS})"
)


def peer_timeout() -> float:
    """Return the seconds that a process waits for another one; 0: it does not.

    Raises:
        UsageError: the environment variable is not such a number.
    """
    return seconds_of(os.environ.get(VARIABLE, str(DEFAULT_SECONDS)), VARIABLE)


def seconds_of(text: str, name: str) -> float:
    """Return a number of seconds.

    Args:
        text: the number.
        name: what holds it, for the message.

    Raises:
        UsageError: the text is not a number, or a number that has no meaning.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{name} {text}: must be at least 0 and finite")
    return seconds


class SetSeconds(argparse.Action):
    """Sets the environment variable to the flag's value."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        seconds_of(values, PEER_TIMEOUT)
        os.environ[VARIABLE] = values


def add_peer_timeout(parser: Any) -> None:
    """Add the flag to a parser, or to a group of it."""
    parser.add_argument(
        PEER_TIMEOUT, action=SetSeconds, default=argparse.SUPPRESS, metavar="SECONDS", help=HELP
    )
