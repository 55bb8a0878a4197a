"""The scripts of examples/benchmark at tiny sizes, and their statistics with a fake clock."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from torch import nn

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmark"
NAMES = (
    *("timing", "layer", "memory", "selection", "train_step", "decode", "scaling", "peers"),
    *("tables", "processes", "report"),
)
SPREAD = {"median", "low", "high"}
FIGURES = {"ratio", "seconds", "base_seconds"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """Import the scripts. They import each other by name, as when they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        before = {name: sys.modules.pop(name, None) for name in NAMES}
        yield {name: importlib.import_module(name) for name in NAMES}
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Restore the state that scripts change, as each script normally has its own process."""
    level = logging.getLogger().level
    metrics.reset()
    yield
    metrics.reset()
    logging.getLogger().setLevel(level)


@pytest.fixture
def timing(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["timing"]


def check_figures(row: dict[str, Any], names: set[str] = FIGURES) -> None:
    for name in names:
        assert set(row[name]) == SPREAD
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


# timing.py


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


class FakeEvent:
    """A CUDA event of a device that runs in step with the host."""

    log: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2500.0


def test_a_gpu_is_timed_by_events(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time excludes preparation and earlier work, and does not come from the host's clock."""
    log: list[str] = []
    monkeypatch.setattr(FakeEvent, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    work = timing.Work(lambda: log.append("run"), prepare=lambda: log.append("prepare"))
    once = ["prepare", "idle", "record", "run", "record", "synchronize"]
    assert timing.seconds(work, device="cuda") == 2.5
    assert log == once
    log.clear()
    compared = timing.compare(work, {"a": work}, 2, device="cuda")
    assert log == once * 2 * (2 + timing.WARM_UP["cuda"])
    assert compared["a"]["seconds"]["median"] == 2.5 and compared["a"]["ratio"]["median"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["layer", "train_step", "decode", "peers"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    name: str, scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    output = tmp_path / "part.json"
    with pytest.raises(SystemExit, match=r"^--device cuda: PyTorch finds no GPU here$"):
        scripts[name].main(["--output", str(output), "--device", "cuda", "--dtype", "bf16"])
    assert not output.exists()


def test_training_in_fp16_needs_a_gpu(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--dtype fp16: fairseq-train needs --device cuda for it"):
        scripts["train_step"].main(["--output", str(tmp_path / "x"), "--dtype", "fp16"])


@pytest.mark.parametrize("size", ["tiny", "gpt3_medium"])
def test_train_step_on_a_gpu_asks_for_one_process_and_its_precision(
    size: str, scripts: dict[str, ModuleType], timing: ModuleType
) -> None:
    place = timing.Place("cuda", "bf16")
    asked = scripts["train_step"].flags("avgk", "adam", 8, 2, size=size, place=place)
    assert "--cpu" not in asked and "--bf16" in asked and f"transformer_lm_avgk_{size}" in asked
    assert asked[asked.index("--distributed-world-size") + 1] == "1"


# The parts


def test_layer_measures_every_selector(scripts: dict[str, ModuleType]) -> None:
    layer = scripts["layer"]
    rows = layer.choose_rows(32, "all")
    assert {row.selector for row in rows} == set(layer.Selector.registry)
    measured = layer.measure(16, 8, rows, repeats=2, ffn=32)
    assert len(measured) == len(rows)
    for row in measured:
        check_figures(row)
        assert row["active_cells"] == 32


def test_layer_in_half_precision(scripts: dict[str, ModuleType], timing: ModuleType) -> None:
    layer, place = scripts["layer"], timing.Place("cpu", "bf16")
    (row,) = layer.measure(16, 8, [layer.Row("avgk", 8)], repeats=1, ffn=32, place=place)
    check_figures(row)
    assert (row["device"], row["dtype"]) == ("cpu", "bf16")


def test_layer_rows_of_the_real_sizes(scripts: dict[str, ModuleType]) -> None:
    layer = scripts["layer"]
    rows = layer.choose_rows(2048, "all")
    assert [row.block_size for row in rows if row.selector == "avgk"] == [
        2048,
        1024,
        256,
        64,
        16,
        1,
    ]
    assert sum(row.skewed for row in rows) == 5
    main = layer.choose_rows(4096, "main")
    assert [row.block_size for row in main] == [4096, 1024, 256, 64, 16, 4096, 4096]
    assert layer.memory_config(layer.Row("pkm", 1), 256, 1024).active_cells == 128
    for row in rows:
        layer.memory_config(row, 512, 2048)


@pytest.mark.parametrize("block_size", [32, 8])
def test_skewed_routing_gives_one_block_half_of_the_tokens(
    scripts: dict[str, ModuleType], block_size: int
) -> None:
    layer = scripts["layer"]
    row = layer.Row("rand_hash", block_size, skewed=True)
    memory = layer.build_memory(row, layer.memory_config(row, 8, 32))
    table_VA = memory.selector.table
    assert (table_VA == 0).any(dim=1).float().mean() > 0.5
    assert all(len(set(blocks)) == len(blocks) for blocks in table_VA[:4500:100].tolist())


def test_layer_writes_its_file(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = scripts["layer"]
    monkeypatch.setattr(layer, "BLOCK_SIZES", ())
    output = tmp_path / "layer.json"
    sizes = ["--tokens", "8", "--width", "8", "--rows", "main", "--repeats", "2"]
    layer.main(["--output", str(output), *sizes])
    part = json.loads(output.read_text())
    assert part["settings"]["device"] == "cpu" and part["gpu"] is None
    assert [row["selector"] for row in part["rows"]] == ["avgk", "switch", "hash_layer"]


def test_memory(scripts: dict[str, ModuleType]) -> None:
    memory, layer = scripts["memory"], scripts["layer"]
    tokens, width, ffn = 64, 16, 32
    dense, sparse = memory.measure(tokens, width, [layer.Row("avgk", 32)], ffn=ffn)
    # Only the activations after ReLU are needed.
    assert dense["saved"] == dense["live"] == tokens * ffn * 4
    assert sparse["live_ratio"] == sparse["live"] / dense["live"]
    for row in (dense, sparse):
        assert row["peak"] > row["temporary"] > 0


def test_saved_bytes_count_a_storage_once_and_parameters_never(
    scripts: dict[str, ModuleType],
) -> None:
    x = torch.ones(8, requires_grad=True)

    def run() -> torch.Tensor:
        y = x.exp()  # saves its result
        return y * y.view(8) * x

    # Autograd saves y and its square.
    assert scripts["memory"].saved_bytes(run, [x]) == 2 * 8 * 4


def test_selection_and_optimizers(scripts: dict[str, ModuleType]) -> None:
    selection, layer = scripts["selection"], scripts["layer"]
    rows = [layer.Row("avgk", 8), layer.Row("hash_layer", 32)]
    measured = selection.measure(16, 8, 2, rows, ffn=32)
    expected = ["selection"] * 2 + ["adam"] * 2 + ["sffn_adam"] * 2
    assert [row["what"] for row in measured] == expected
    for row in measured:
        check_figures(row)


def test_train_step(scripts: dict[str, ModuleType]) -> None:
    train_step = scripts["train_step"]
    runs = (("avgk", "adam"), ("avgk", "sffn_adam"), ("hash_layer", "sffn_adam"))
    rows = train_step.measure(2, runs, context=8, sentences=2)
    assert [(row["model"], row["optimizer"]) for row in rows] == list(runs)
    for row in rows:
        check_figures(row)
        assert row["tokens_per_second"] > 0
        assert row["stands_for"].startswith("fairseq-train DATA --user-dir fairseq_sffn")


def test_train_step_trains(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    train_step = scripts["train_step"]
    words = "".join(f"w{i} 1\n" for i in range(train_step.VOCABULARY - 4))
    (tmp_path / "dict.txt").write_text(words)
    config = train_step.training_config("hash_layer", "adam", str(tmp_path), 8, 2)
    assert config.dataset.batch_size == 2 and config.optimization.clip_norm == 1
    trainer = train_step.build_trainer(config)
    batch = train_step.random_batch(8, 2)
    assert batch["target"][:, :-1].equal(batch["net_input"]["src_tokens"][:, 1:])
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step([batch])
    assert trainer.get_num_updates() == 1
    changed = [name for name, p in trainer.model.named_parameters() if not p.equal(before[name])]
    assert any("values" in name for name in changed)


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


def test_decode(scripts: dict[str, ModuleType]) -> None:
    rows = scripts["decode"].measure(2, counts=(1, 2), widths=(16,), at_least=1e-4)
    assert {row["mode"] for row in rows} == {"inference_mode"}
    assert {row["tokens"] for row in rows} == {1, 2}
    for row in rows:
        check_figures(row, {"ratio"})
        assert row["tokens_per_second"] > 0 and row["dense_tokens_per_second"] > 0


def test_tables(scripts: dict[str, ModuleType]) -> None:
    rows = scripts["tables"].measure(2, tokens=8, width=4, cells=6, blocks=2)
    assert [row["product"] for row in rows].count("gradient of keys") == 3 and len(rows) == 7
    for row in rows:
        check_figures(row)
    assert "fresh memory" in scripts["report"].tables_table({"rows": rows})


def test_scaling_and_its_figure(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    scaling = scripts["scaling"]
    axes = {"tokens": (16, 32), "active_cells": (64, 128), "expansion": (1, 2)}
    rows = scaling.measure(2, axes, width=8)
    assert [(row["axis"], row[row["axis"]]) for row in rows] == [
        (axis, value) for axis, values in axes.items() for value in values
    ]
    for row in rows:
        check_figures(row, FIGURES | {"selection"})
    part = {"rows": rows, "settings": {"threads": 1}}
    scaling.write_plot(part, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_peers_that_are_not_there_or_fail_are_told(scripts: dict[str, ModuleType]) -> None:
    peers = scripts["peers"]

    def linear(width: int, cells: int) -> tuple[nn.Module, Any, int]:
        layer = nn.Linear(width, width)
        return layer, layer, cells

    def fails(width: int, cells: int) -> tuple[nn.Module, Any, int]:
        raise ImportError("no such name\nin it")

    absent, works, broken = peers.measure(
        16,
        8,
        2,
        (
            peers.Peer("product-key-memory", "PKM", linear, ""),
            peers.Peer("torch", "Linear", linear, ""),
            peers.Peer("torch", "Nothing", fails, ""),
        ),
    )
    assert absent["error"] == "not installable" and absent["version"]
    check_figures(works)
    assert works["active_cells"] == works["dense_cells"] == 32
    assert broken["error"] == "ImportError: no such name"


def test_peers_are_pinned(scripts: dict[str, ModuleType]) -> None:
    peers = scripts["peers"]
    wanted = peers.wanted_versions(peers.REQUIREMENTS.read_text())
    assert {peer.package for peer in peers.PEERS} <= set(wanted)


@pytest.mark.parametrize(("cells", "experts", "units"), [(1024, 1, 680), (1024, 2, 344)])
def test_gated_experts_have_the_active_size(
    scripts: dict[str, ModuleType], cells: int, experts: int, units: int
) -> None:
    assert scripts["peers"].gated_width(cells, experts) == units
    assert abs(units * experts * 1.5 - cells) < 0.02 * cells


# report.py


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
    assert results["command"] == "bash x.sh" and len(results["parts"]) == 9
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
