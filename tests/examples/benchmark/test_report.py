"""The report on parts that were made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.examples.benchmark.figures import FIGURES


def part(name: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {
        "part": name,
        "settings": {"repeats": 2, "threads": 1, "code": "of old", **settings},
        **{"seed": 1, "torch": "2.13.0", "gpu": None, "date": "2000-01-01", "minutes": 1.0},
        "rows": rows,
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Make the folder of a run with every part."""
    spread = {"median": 2.0, "low": 1.5, "high": 2.5}
    figures = dict.fromkeys(FIGURES, spread)
    bytes_ = dict.fromkeys(("saved", "live", "peak", "temporary"), 2**20)
    memory = {"selector": "avgk", "block_size": 64, **bytes_}
    ratios = {f"{name}_ratio": 1.25 for name in bytes_}
    peer = {"package": "p", "version": "1.0", "layer": "L", "active": "x"}
    speeds = {"tokens_per_second": 1000.0, "dense_tokens_per_second": 2000.0}
    point = {"tokens": 256, "active_cells": 1024, "expansion": 16, "selection": spread}
    of_layer = {
        **{"tokens": 2048, "width": 256, "selector": "avgk", "block_size": 64, "skewed": False},
        **{"active_cells": 1024, **figures},
    }
    sizes = {"tokens": 2048, "width": 256, "device": "cpu"}
    parts = {
        "layer-1": part("layer", [of_layer, {**of_layer, "skewed": True}], **sizes),
        "layer-2": part("layer", [of_layer], **{**sizes, "threads": 2}),
        "layer-glu-1": part("layer", [of_layer], **sizes, glu="silu"),
        "memory": part("memory", [{**memory, "selector": "dense"}, {**memory, **ratios}]),
        "selection": part(
            "selection", [{"what": "adam", "selector": "avgk", "block_size": 64, **figures}]
        ),
        "train_step": part(
            "train_step", [{"model": "avgk", "optimizer": "adam", **figures, **speeds}]
        ),
        "processes": part(
            "processes",
            [
                {"model": "avgk", "processes": 2, "ddp_backend": "legacy_ddp", **figures}
                | {"tokens_per_second": 3000.0, "base_tokens_per_second": 2000.0}
                | {"speedup": spread, "expert_parallel": 2, "sent_bytes": 2.0**20}
            ],
        ),
        "decode": part(
            "decode",
            [
                {"width": 8, "tokens": n, "mode": "no_grad", "selector": "avgk", "block_size": 8}
                | {"ratio": spread, **speeds}
                for n in (1, 2)
            ],
        ),
        "scaling": part(
            "scaling",
            [
                {"axis": axis, **point, **figures}
                for axis in ("tokens", "active_cells", "expansion")
            ],
        ),
        "peers": part(
            "peers",
            [
                {**peer, "active_cells": 1, "dense_cells": 2, **figures},
                {**peer, "error": "not installable"},
            ],
        ),
    }
    (tmp_path / "parts").mkdir()
    for name, content in parts.items():
        (tmp_path / "parts" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_report(
    scripts: dict[str, ModuleType], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts["report"].main(["--runs", str(runs), "--command", "bash x.sh"])
    text = (runs / "table.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "| avgk | 64 | 1.60 | 2 (1.5-2.5) |" in text
    assert "| vanilla_m | 1 | 11.00 | not measured |" in text
    assert "| avgk | 64 | 1024 | 2 (1.5-2.5) | 2 (1.5-2.5) |" in text
    assert "| avgk, skewed | 64 | 1024 | 2 (1.5-2.5) |  |" in text
    assert "N = 2048, d = 256, cpu, gated cells (silu); the dense FFN takes" in text
    assert "| avgk | 64 | 1.0 (1.25) | 1.0 (1.25) | 1.0 (1.25) | 1.0 (1.25) |" in text
    assert "| adam | avgk | 64 | 2 (1.5-2.5) |" in text
    assert "| dense | adam | 2,000 | 1 |" in text
    assert "| avgk | 1 |  |  | 2,000 | 1 |  |  |" in text
    assert "| 2 | legacy_ddp | 2 | 3,000 | 2 (1.5-2.5) | 2 (1.5-2.5) | 1.0 |" in text
    assert "| avgk | 8 | 1,000 (2.00) | 1,000 (2.00) |" in text
    assert "| tokens | 256 | 2 (1.5-2.5) | 1.00 |" in text
    assert "| p 1.0 | L | x |  |  | not installable |" in text
    assert "Measured with other code" in text
    results = json.loads((runs / "results.json").read_text())
    assert {"cpu", "cores", "torch", "commit", "dates", "seed", "command", "parts"} <= set(results)
    assert results["command"] == "bash x.sh" and len(results["parts"]) == 10
    assert (runs / "scaling.png").is_file()


def test_report_of_nothing(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no parts"):
        scripts["report"].main(["--runs", str(tmp_path)])


def test_goals_take_the_right_part(scripts: dict[str, ModuleType], runs: Path) -> None:
    report = scripts["report"]
    parts = [part for part in report.read_parts(runs / "parts") if part["part"] == "layer"]
    assert not any(part["current"] for part in parts)
    two_threads = [part for part in parts if part["settings"]["threads"] == 2]
    assert "| avgk | 64 | 1.60 | not measured |" in report.goals_table(two_threads)
