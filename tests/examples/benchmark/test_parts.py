"""The parts that measure one thing each, at tiny sizes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from tests.examples.benchmark.figures import FIGURES, check_figures


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
