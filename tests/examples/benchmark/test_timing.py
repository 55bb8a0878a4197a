"""Times and ratios with a fake clock, and the files of parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


class FakeClock:
    """A clock that only moves when a work says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, durations: list[float]) -> Callable[[], None]:
        remaining = iter(durations)

        def run() -> None:
            self.now += next(remaining)

        return run


def test_a_ratio_is_of_neighbours_and_the_first_round_is_not_counted(timing: ModuleType) -> None:
    clock = FakeClock()
    # The machine is ten times slower in the last round, which no ratio shows.
    base = timing.Work(clock.wait([99, 99, 1, 1, 2, 2, 10, 10]))
    works = {
        "a": timing.Work(clock.wait([1, 3, 6, 30])),
        "b": timing.Work(clock.wait([1, 1, 4, 30])),
    }
    result = timing.compare(base, works, 3, clock=clock)
    assert result["a"]["ratio"] == {"median": 3, "low": 3, "high": 3}
    assert result["b"]["ratio"] == {"median": 2, "low": 1.5, "high": 2.5}
    assert result["b"]["seconds"]["median"] == 4
    assert result["a"]["base_seconds"]["median"] == 2


def test_preparation_is_not_timed(timing: ModuleType) -> None:
    clock = FakeClock()
    work = timing.Work(clock.wait([2]), prepare=clock.wait([50]))
    assert timing.seconds(work, clock) == 2


def test_works_alternate_with_the_base(timing: ModuleType) -> None:
    order: list[str] = []
    work = {name: timing.Work(lambda name=name: order.append(name)) for name in "xab"}
    timing.compare(work["x"], {"a": work["a"], "b": work["b"]}, 1)
    assert order == list("xaxb") * 2


def test_spread_of_one_value_and_of_many(timing: ModuleType) -> None:
    assert timing.spread([4.0]) == {"median": 4, "low": 4, "high": 4}
    assert timing.spread([1, 2, 3, 4, 5]) == {"median": 3, "low": 2, "high": 4}


def test_gradients_start_at_none_and_the_loss_counts(timing: ModuleType) -> None:
    module, x = nn.Linear(2, 2), torch.randn(3, 2, requires_grad=True)
    plain = timing.forward_backward(module, x)
    for _ in range(2):
        plain.prepare()
        assert module.weight.grad is None and x.grad is None
        plain.run()
    with_loss = timing.forward_backward(module, x, lambda x: (0 * module(x), module.bias.sum()))
    with_loss.prepare()
    with_loss.run()
    assert module.bias.grad is not None and module.bias.grad.tolist() == [1, 1]


def test_a_part_is_measured_once(timing: ModuleType, tmp_path: Path) -> None:
    calls: list[int] = []

    def run(*flags: str) -> dict[str, Any]:
        output = tmp_path / "parts" / "layer.json"
        args = timing.arguments("x").parse_args(["--output", str(output), *flags])
        timing.run_part("layer", args, lambda: [{"call": calls.append(1)}])
        return json.loads(output.read_text())

    part = run("--repeats", "2")
    assert part["settings"]["repeats"] == 2 and part["part"] == "layer"
    assert {"command", "seed", "torch", "date", "minutes", "rows"} <= set(part)
    run("--repeats", "2")
    assert len(calls) == 1
    run("--repeats", "2", "--force")
    run("--repeats", "3")
    assert len(calls) == 3


def test_no_repeats_are_refused(timing: ModuleType, tmp_path: Path) -> None:
    args = timing.arguments("x").parse_args(["--output", str(tmp_path / "x"), "--repeats", "0"])
    with pytest.raises(SystemExit, match="--repeats 0: must be at least 1"):
        timing.run_part("layer", args, list)
