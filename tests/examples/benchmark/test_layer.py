"""Layers of every selector, their rows and their routing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.examples.benchmark.figures import check_figures


def test_layer_measures_every_selector(scripts: dict[str, ModuleType]) -> None:
    layer = scripts["layer"]
    rows = layer.choose_rows(32, "all")
    assert {row.selector for row in rows} == set(layer.Selector.registry)
    measured = layer.measure(16, 8, rows, repeats=2, ffn=32)
    assert len(measured) == len(rows)
    for row in measured:
        check_figures(row)
        assert row["active_cells"] == 32


def test_gated_layers(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, output = scripts["layer"], tmp_path / "layer.json"
    monkeypatch.setattr(layer, "BLOCK_SIZES", ())
    sizes = ["--tokens", "8", "--width", "24", "--rows", "defaults", "--repeats", "1"]
    layer.main(["--output", str(output), *sizes, "--glu", "silu"])
    rows = json.loads(output.read_text())["rows"]
    assert {"avgk", "switch", "vanilla_m"} <= {row["selector"] for row in rows}
    assert not {"pkm", "lorkm"} & {row["selector"] for row in rows}
    for row in rows:
        check_figures(row)
        assert (row["ffn"], row["active_cells"]) == (64, 64)
    ffn = layer.gated_ffn(24, 64, "silu")
    assert sum(p.numel() for p in ffn.parameters()) == 3 * 24 * 64 + 2 * 64 + 24


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
