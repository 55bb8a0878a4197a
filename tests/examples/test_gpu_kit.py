"""The validation kit of examples/gpu without a GPU: it runs, and it notices faults."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fairseq_sffn.memory import Selector
from fairseq_sffn.memory.compute import tiled_torch

ROOT = Path(__file__).parents[2]
GPU = ROOT / "examples" / "gpu"
NAMES = ("point", "points", "layers", "probes", "speed", "training", "twins", "runner", "report")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def kit() -> Iterator[dict[str, ModuleType]]:
    """Import the modules of the package ``validation``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GPU))
        yield {name: importlib.import_module(f"validation.{name}") for name in NAMES}


def script(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell script with the Python of the tests."""
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"]}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(GPU / name), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line with which a command refuses."""
    assert done.returncode != 0
    (line,) = (done.stdout + done.stderr).splitlines()
    return line


@WITHOUT_GPU
def test_a_machine_without_a_gpu_is_refused_in_one_line() -> None:
    line = refusal(script("validate.sh"))
    assert line == "validate: PyTorch finds no GPU here; --fake runs what works without one"


def test_a_flag_and_its_value_may_be_one_word(tmp_path: Path) -> None:
    done = script("validate.sh", f"--wheels={tmp_path}/missing")
    assert refusal(done) == f"validate: --wheels {tmp_path}/missing: is no folder"
    done = script("validate.sh", "--help")
    assert done.returncode == 0 and "--wheels DIR" in done.stdout


def test_wheels_that_are_not_there_are_refused_in_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    line = refusal(script("validate.sh", "--fake", "--wheels", missing))
    assert line == f"validate: --wheels {missing}: is no folder"


@pytest.mark.parametrize(
    ("arguments", "reason"), [([], "usage"), (["{}", "3"], "PYTHON_VERSION 3: must be like 3.12")]
)
def test_collect_wheels_refuses_in_one_line(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    line = refusal(script("collect_wheels.sh", *(each.format(tmp_path) for each in arguments)))
    assert reason in line


def test_packages_have_the_versions_of_the_examples() -> None:
    pins = (ROOT / "examples" / "requirements.txt").read_text().lower().splitlines()
    names = [line for line in (GPU / "packages.txt").read_text().splitlines() if line[0] != "#"]
    for name in names:
        assert any(pin.startswith(f"{name.lower()}==") for pin in pins), name
    assert not {"torch", "torchaudio", "triton", "numpy"} & set(names)


def test_the_kit_without_a_gpu(kit: dict[str, ModuleType], tmp_path: Path) -> None:
    output = tmp_path / "results" / "fake.json"
    done = script("validate.sh", "--fake", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(output.read_text())
    assert {"mode", "card", "date", "versions", "commit", "goals", "points"} <= set(made)
    points = [point for point in kit["points"].POINTS if point.on_cpu]
    assert list(made["points"]) == [point.name for point in points]
    numbers = {point.number for point in kit["points"].POINTS}
    assert numbers == set(range(1, 10))  # the tenth is the file and the table
    checked = {row["what"] for row in made["points"]["methods"]["rows"]}
    assert all(any(name in what for what in checked) for name in Selector.registry)
    for point in made["points"].values():
        assert point["status"] in ("passed", "measured")
    assert "waits: needs a GPU" in done.stdout
    again = [sys.executable, str(GPU / "validate.py"), "--table", str(output)]
    shown = subprocess.run(again, capture_output=True, text=True).stdout.splitlines()
    assert f"torch {torch.__version__}" in shown[0]
    assert any(line.startswith("| layer vanilla_m g=1, 64 x 16 |") for line in shown)
    for place in (ROOT, Path.home(), tmp_path, sys.prefix):
        assert str(place) not in output.read_text()


def test_points_that_need_a_gpu_are_refused_without_one(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    line = refusal(script("validate.sh", "--fake", "--only", "waits", "--output", output))
    assert line == "validate: --only waits: nothing of it runs on a machine without a GPU"


# Faults


def checked(kit: dict[str, ModuleType], *checks: Any) -> list[Any]:
    """Check points in this process and return their results."""
    runner, point = kit["runner"], kit["point"]
    points = [point.Point(f"p{i}", i, "a point", check, 10) for i, check in enumerate(checks)]
    results, rows = [], []

    def emit(event: dict[str, Any]) -> None:
        event = json.loads(json.dumps(event))
        if "row" in event:
            rows.append(event["row"])
        elif "end" in event:
            its = points[len(results)]
            results.append(runner.judged(its, 1.0, list(rows), event["error"]))
            rows.clear()

    runner.check_all(points, point.Setting("cpu", Path()), emit)
    return results


def test_a_point_that_raises_is_recorded_and_the_rest_goes_on(
    kit: dict[str, ModuleType], tmp_path: Path
) -> None:
    point = kit["point"]

    def raises(setting: Any) -> Iterator[Any]:
        yield point.asserted("before", True)
        raise ValueError(f"no such thing in {ROOT}")

    def refuses(setting: Any) -> Iterator[Any]:
        yield sys.exit("--flag: refused")

    def passes(setting: Any) -> Iterator[Any]:
        yield point.bounded("near", 0.5, 1.0)
        yield kit["speed"].with_goal("slow", 3.0, 2.0)

    def measures(setting: Any) -> Iterator[Any]:
        yield point.told("something")

    results = checked(kit, raises, refuses, passes, measures)
    assert [result.status for result in results] == ["failed", "failed", "passed", "measured"]
    assert [result.bad for result in results] == [True, True, False, False]
    assert results[0].count(True) == 1 and "ValueError" in results[0].error
    text = kit["report"].table(results)
    assert "ValueError: no such thing" in text and "--flag: refused" in text
    assert "slow: 3.00 times dense, goal 2: MISSED" in text
    output = tmp_path / "results.json"
    kit["report"].write(output, tmp_path, results, {"card": "a card"})
    made = json.loads(output.read_text())
    assert made["goals"] == [{"what": "slow", "ratio": 3.0, "goal": 2.0, "met": False}]
    assert "no such thing in PROJECT" in made["points"]["p0"]["error"]


@pytest.mark.parametrize("value", [2.0, float("nan"), float("inf")])
def test_numbers_beyond_a_tolerance_fail(kit: dict[str, ModuleType], value: float) -> None:
    row = kit["point"].bounded("far", value, 1.0)
    assert not row["passed"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    "name", ["gathered_products", "scattered_products", "table_products", "index"]
)
def test_a_wrong_product_is_noticed(
    name: str, kit: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faults are numbers that are 30% off, gradients for other blocks, and numbers that are not
    finite."""
    layers = kit["layers"]
    case = layers.Case("avgk", 16, engine="tiled")
    assert layers.check_case(case, "cpu")["passed"]
    if name == "index":
        plain = tiled_torch.table_products

        def shifted(*arguments: Any) -> Any:
            return tuple(table.roll(1, 0) for table in plain(*arguments))

        monkeypatch.setattr(tiled_torch, "table_products", shifted)
    else:
        product = getattr(tiled_torch, name)

        def wrong(*arguments: Any) -> Any:
            made = product(*arguments)
            return tuple(each * 1.3 for each in made) if isinstance(made, tuple) else made * 1.3

        monkeypatch.setattr(tiled_torch, name, wrong)
    row = layers.check_case(case, "cpu")
    assert not row["passed"] and row["value"] > row["limit"]


def test_a_layer_that_fails_is_recorded_and_the_rest_goes_on(
    kit: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "no kernel"

    def fails(*arguments: Any) -> Any:
        raise RuntimeError(f"{reason}\nand more")

    monkeypatch.setattr(tiled_torch, "gathered_products", fails)
    setting = kit["point"].Setting("cpu", Path())
    rows = list(kit["layers"].every_method(setting))
    failed = [row for row in rows if row["passed"] is False]
    assert {row["error"] for row in failed} == {"RuntimeError: no kernel"}
    assert len(rows) == len(list(kit["layers"].cases(fake=True))) + 1
    reason = "CUDA error: an illegal memory access"  # nothing runs after it
    (result,) = checked(kit, lambda _: kit["layers"].every_method(setting))
    assert result.status == "failed" and len(result.rows) == 1
    assert "no later kernel" in result.error


def test_worse_blocks_than_the_best_are_noticed(kit: dict[str, ModuleType]) -> None:
    layers, twins = kit["layers"], kit["twins"]
    memory, inputs = layers.build(layers.Case("avgk", 16, padded=False))
    twin = twins.twin_of(memory, "cpu", "loop")
    exact = inputs.to("cpu", torch.float64)
    out, _ = twins.forward_backward(twin, exact)
    for blocks_NA, least, most in (
        (out.selection.blocks, 0.0, 1e-12),
        (torch.arange(out.selection.blocks.shape[1]).expand_as(out.selection.blocks), 0.5, 100),
    ):
        with twins.forced(blocks_NA) as lost:
            again, _ = twins.forward_backward(twin, exact)
        assert torch.equal(again.selection.blocks, blocks_NA)
        assert least <= max(lost) <= most


def test_every_case_of_a_gpu_can_be_built(kit: dict[str, ModuleType]) -> None:
    """A case whose sizes a selector refuses would fail on the GPU."""
    layers = kit["layers"]
    cases = list(layers.cases(fake=False))
    assert len(cases) == len(set(cases)) > 300
    for case in cases:
        if case.dtype == "fp32":
            layers.build(case)


def test_a_curve_that_is_off_is_noticed(kit: dict[str, ModuleType]) -> None:
    training = kit["training"]
    want = [8.0, 7.0, 6.0]
    assert training.curve("same", [8.0, 7.01, 6.0], want, 0.01)["passed"]
    for got in ([8.0, 7.2, 6.0], [8.0, 7.0], [8.0, float("nan"), 6.0], []):
        assert not training.curve("off", got, want, 0.01)["passed"]


# Processes

BEGINS = """
import json, os, sys, time
file = open(sys.argv[1], "a")
def emit(event):
    file.write(json.dumps(event) + "\\n")
    file.flush()
emit({"row": {"what": "first", "passed": True}})
"""
ENDS = 'emit({"end": "p0", "error": None})\n'
DIES = 'print("a kernel failed", flush=True)\nos._exit(7)\n'
HANGS = "time.sleep(600)\n"


def run_group(
    kit: dict[str, ModuleType], tmp_path: Path, program: str, seconds: float = 60
) -> list[Any]:
    """Run two points in a process that runs a program, and return their results."""
    point, runner = kit["point"], kit["runner"]
    points = [point.Point(f"p{i}", i, "a point", lambda setting: iter(()), 60) for i in range(2)]

    def command(group: list[Any], events: Path) -> list[str]:
        return [sys.executable, "-c", program, str(events)]

    setting = point.Setting("cpu", tmp_path)
    deadline = time.monotonic() + seconds
    return list(runner.run_group(points, setting, command, deadline, lambda *_: None))


def test_a_process_that_dies_fails_the_point_it_was_at(
    kit: dict[str, ModuleType], tmp_path: Path
) -> None:
    first, second = run_group(kit, tmp_path, BEGINS + ENDS + DIES)
    assert (first.status, second.status) == ("passed", "failed")
    assert "exit status 7" in second.error and "a kernel failed" in second.error
    (alone,) = run_group(kit, tmp_path, BEGINS + DIES)
    assert alone.status == "failed" and len(alone.rows) == 1


def test_a_process_that_hangs_is_stopped(kit: dict[str, ModuleType], tmp_path: Path) -> None:
    start = time.monotonic()
    (result,) = run_group(kit, tmp_path, BEGINS + HANGS, seconds=3)
    assert time.monotonic() - start < 30
    assert result.status == "cut" and result.bad and len(result.rows) == 1


def test_points_after_a_crash_get_another_process(
    kit: dict[str, ModuleType], tmp_path: Path
) -> None:
    point, runner = kit["point"], kit["runner"]
    points = [point.Point(f"p{i}", i, "a point", lambda setting: iter(()), 60) for i in range(3)]
    programs = iter([BEGINS + DIES, BEGINS + ENDS + ENDS])

    def command(group: list[Any], events: Path) -> list[str]:
        return [sys.executable, "-c", next(programs), str(events)]

    setting = point.Setting("cpu", tmp_path)
    results = runner.run_points(points, setting, command, 5, lambda *_: None)
    assert [result.status for result in results] == ["failed", "passed", "measured"]
    none = runner.run_points(points, setting, command, 0, lambda *_: None)
    assert [result.status for result in none] == ["not run"] * 3


def test_each_point_has_a_process_of_its_own_on_a_gpu(
    kit: dict[str, ModuleType], tmp_path: Path
) -> None:
    point, runner = kit["point"], kit["runner"]
    points = [point.Point(f"p{i}", i, "a point", lambda setting: iter(()), 60) for i in range(2)]
    groups: list[list[str]] = []

    def command(group: list[Any], events: Path) -> list[str]:
        groups.append([point.name for point in group])
        return [sys.executable, "-c", BEGINS + ENDS, str(events)]

    setting = point.Setting("cuda", tmp_path)
    results = list(runner.run_points(points, setting, command, 5, lambda *_: None))
    assert groups == [["p0"], ["p1"]]
    assert [result.status for result in results] == ["passed", "passed"]


# Operations that need a GPU


def test_waits_are_counted_after_a_first_run(
    kit: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run() -> None:
        if modes:  # the first run is not watched
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("this mode does not detect all synchronizing ones", stacklevel=1)

    assert len(kit["probes"]._waits(run)) == 1
    assert modes == ["warn", "default"]
