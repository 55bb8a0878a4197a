"""Measures how Avg-K's cost (g = 64, d = 256) grows with tokens, active cells and expansion."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from layer import EXPANSION, VOCABULARY, Row, build_memory, memory_config, training_work
from selection import selection_work
from timing import arguments, compare, dense_ffn, forward_backward, hidden_states, run_part

WIDTH, BLOCK_SIZE = 256, 64
TOKENS, CELLS = 2048, 1024
AXES = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
    "active_cells": (256, 512, 1024, 2048, 4096),
    "expansion": (1, 2, 4, 8, 16, 32, 64),
}
TITLES = {
    "tokens": f"tokens N (k = {CELLS}, E = {EXPANSION})",
    "active_cells": f"active cells k (N = {TOKENS}, E = {EXPANSION})",
    "expansion": f"E, times the cells (N = {TOKENS}, k = {CELLS})",
}


def measure(
    repeats: int,
    axes: dict[str, tuple[int, ...]] = AXES,
    width: int = WIDTH,
    block_size: int = BLOCK_SIZE,
) -> list[dict[str, Any]]:
    """Return a JSON row for each point of each axis; ``selection`` is the time of the selector
    alone."""
    rows: list[dict[str, Any]] = []
    for axis, values in axes.items():
        for value in values:
            point = {"tokens": TOKENS, "active_cells": CELLS, "expansion": EXPANSION, axis: value}
            cells = point["active_cells"]
            x = hidden_states(point["tokens"], width)
            token_ids = torch.randint(VOCABULARY, (point["tokens"],))
            row = Row("avgk", block_size)
            memory = build_memory(row, memory_config(row, width, cells, point["expansion"]))
            works = {
                "layer": training_work(memory, x, token_ids),
                "selection": selection_work(memory, x, token_ids),
            }
            dense = forward_backward(dense_ffn(width, cells), x)
            timed = compare(dense, works, repeats, f"scaling {axis} {value}")
            rows.append(
                {
                    "axis": axis,
                    **point,
                    **timed["layer"],
                    "selection": timed["selection"]["seconds"],
                }
            )
    return rows


def draw_panel(axes: Any, rows: list[dict[str, Any]], axis: str) -> None:
    """Draw one axis: the dense FFN, the layer with quartiles, and the selection against E."""
    at = [row[axis] for row in rows]
    curves = {"base_seconds": ("dense FFN", "black"), "seconds": ("Avg-K, g = 64", "tab:blue")}
    if axis == "expansion":
        curves["selection"] = ("its selection alone", "tab:orange")
    for key, (label, color) in curves.items():
        low, median, high = (
            [1000 * row[key][name] for row in rows] for name in ("low", "median", "high")
        )
        style = "--" if key == "base_seconds" else "-"
        axes.plot(at, median, style, marker=".", label=label, color=color)
        axes.fill_between(at, low, high, alpha=0.2, color=color, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(at, [str(value) for value in at])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(TITLES[axis])
    axes.grid(alpha=0.3, which="both")


def plot(rows: list[dict[str, Any]], threads: int = 1) -> bytes:
    """Return the bytes of a PNG."""
    from matplotlib.figure import Figure  # not before fairseq's log level is undone

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        draw_panel(panel, [row for row in rows if row["axis"] == axis], axis)
    panels[0].set_ylabel("forward + backward, ms")
    panels[-1].legend()
    figure.suptitle(f"d = {WIDTH}, threads: {threads}; median and quartiles")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def write_plot(part: dict[str, Any], path: Path) -> None:
    path.write_bytes(plot(part["rows"], part["settings"]["threads"]))


def main(argv: list[str] | None = None) -> None:
    args: argparse.Namespace = arguments(__doc__).parse_args(argv)
    run_part("scaling", args, lambda: measure(args.repeats))


if __name__ == "__main__":
    main()
