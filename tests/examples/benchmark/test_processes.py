"""Training steps in several processes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.examples.benchmark.figures import check_figures


def test_processes(scripts: dict[str, ModuleType]) -> None:
    processes = scripts["processes"]
    rows = processes.measure(1, models=("dense", "avgk"), context=8, sentences=2)
    ways = [(row["model"], row["ddp_backend"], row["expert_parallel"]) for row in rows]
    apart, *backends = processes.APART.ddp_backend, *processes.BACKENDS
    assert ways == [
        *(("dense", backend, 1) for backend in (apart, *backends)),
        ("avgk", apart, 1),
        *(("avgk", backend, count) for backend in backends for count in (1, 2)),
    ]
    for row in rows:
        sharded = row["expert_parallel"] > 1
        check_figures(
            row, {"speedup", "seconds", "base_seconds"} | ({"ratio"} if sharded else set())
        )
        expected = 2 * row["base_seconds"]["median"] / row["seconds"]["median"]
        assert row["speedup"]["median"] == pytest.approx(expected)
        assert row.get("sent_bytes", 0) > 0 if sharded else "ratio" not in row
        assert ("--sffn-expert-parallel 2" in row["stands_for"]) == sharded
    assert "| avgk | 1 |" in scripts["report"].processes_table({"rows": rows})


def test_the_slowest_process_counts(
    scripts: dict[str, ModuleType], timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = scripts["processes"]
    clock = iter([99, 99, 1, 2, 3, 4])
    monkeypatch.setattr(processes, "seconds", lambda work: next(clock))
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)

    def gather(of_all: list[Any], own: list[list[float]]) -> None:
        of_all[:] = own, [[0, 5], [6, 0]]

    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    works = [timing.Work(lambda: None)] * 2
    assert processes.step_seconds(works, 2, "") == [[1, 6], [5, 4]]
