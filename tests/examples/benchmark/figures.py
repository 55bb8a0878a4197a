"""The figures that a row of a part has."""

from __future__ import annotations

from typing import Any

SPREAD = {"median", "low", "high"}
FIGURES = {"ratio", "seconds", "base_seconds"}


def check_figures(row: dict[str, Any], names: set[str] = FIGURES) -> None:
    for name in names:
        assert set(row[name]) == SPREAD
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
