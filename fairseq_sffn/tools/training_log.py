"""Reads the logs of fairseq-train with ``--log-format json``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RECORD = re.compile(r".*\| INFO \| (train_inner|valid) \| (\{.*\})$")
"""A record, possibly after the beginning of a line that a killed run did not finish."""


def log_records(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Read the records of a log. Where a run was resumed, records of updates that it repeated
    replace the earlier ones.

    Args:
        path: file of the log.

    Returns:
        Pairs of kind, ``train_inner`` or ``valid``, and logged values, in order of updates.
    """
    records: dict[tuple[str, float], tuple[str, dict[str, float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = RECORD.match(line.rstrip())
        if match is None:
            continue
        try:
            logged = json.loads(match[2])
        except json.JSONDecodeError:  # lines of two processes run together
            continue
        prefix = "valid_" if match[1] == "valid" else ""
        record = {name.removeprefix(prefix): _number(value) for name, value in logged.items()}
        records[match[1], record["num_updates"]] = (match[1], record)
    return sorted(records.values(), key=lambda item: (item[1]["num_updates"], item[0]))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
