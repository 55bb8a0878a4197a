"""Reads the logs of fairseq-train with ``--log-format json``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RECORD = re.compile(r".*\| INFO \| (train_inner|valid) \| (\{.*\})$")
"""Matches a record. A killed run may have left an unfinished line before it."""


def log_records(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Return the records of a log.

    If a resumed run repeated updates, their later records replace the earlier ones.

    Args:
        path: the log file.

    Returns:
        (kind, logged values) of each record in order of updates. The kind is ``train_inner`` or
        ``valid``.
    """
    records: dict[tuple[str, float], tuple[str, dict[str, float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = RECORD.match(line.rstrip())
        if match is None:
            continue
        try:
            logged = json.loads(match[2])
        except json.JSONDecodeError:  # two processes wrote to one line
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
