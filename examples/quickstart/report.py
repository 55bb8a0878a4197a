"""Makes the quickstart's table, results.json and figures, with n-gram models as baselines.

It reads from each model's directory RUNS/NAME: train.log (fairseq-train with --log-format json),
evaluation.json (fairseq-sffn evaluate, on the sets valid and test, and --routing on valid),
checkpoints/checkpoint_best.pt and, if it exists, command.txt. All values of a model belong to
checkpoint_best, except its speed and its curve.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from ngram import ngram_rows, write_atomically

from fairseq_sffn.tools.cost import checkpoint_cost
from fairseq_sffn.tools.training_log import log_records

LOAD_KEYS = ("load_max", "unused_blocks", "load_entropy")
RESULT_KEYS = (
    *("arch", "name", "params", "active_params", "flops_per_token", "valid_ppl", "test_ppl"),
    *("tokens_per_second", *LOAD_KEYS, "updates", "seed", "command"),
)

LEAST_LOAD = 1e-2
"""Smaller loads over the mean are not shown."""

COLUMNS = {
    "name": ("model", "{}"),
    "params": ("parameters", "{:,}"),
    "active_params": ("active", "{:,}"),
    "flops_per_token": ("FLOPs/token", "{:,}"),
    "valid_ppl": ("valid ppl", "{:.2f}"),
    "test_ppl": ("test ppl", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "load_max": ("load max/mean", "{:.2f}"),
    "unused_blocks": ("unused blocks", "{:g}"),
}


def read_evaluation(path: Path) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Read what fairseq-sffn evaluate printed.

    Returns:
        Split -> perplexity per token, and number of each sparse layer -> tokens of its blocks.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sets = {name.rpartition(":")[2]: values for name, values in found["sets"].items()}
        perplexities = {split: float(sets[split]["perplexity"]) for split in ("valid", "test")}
        counts = {name: layer["counts"] for name, layer in found.get("routing", {}).items()}
    except (ValueError, KeyError) as error:
        sys.exit(f"--models {path.parent.name}: {path} is no evaluation: {error!r}")
    return perplexities, counts


def model_result(
    run: Path, data: Path
) -> tuple[dict[str, Any], list[tuple[int, float]], dict[str, list[int]]]:
    """Read the results of a model.

    `updates` is the number for the whole run. `tokens_per_second` is the median over the training
    log without its first record, which includes the start-up.

    Returns:
        A row with RESULT_KEYS, a curve of (updates, validation perplexity), and the number of each
        sparse layer -> tokens of its blocks.
    """
    log_path, checkpoint_path = run / "train.log", run / "checkpoints" / "checkpoint_best.pt"
    evaluation_path = run / "evaluation.json"
    for path in (log_path, checkpoint_path, evaluation_path):
        if not path.is_file():
            sys.exit(f"--models {run.name}: {path} does not exist")

    records = log_records(log_path)
    valid = [record for kind, record in records if kind == "valid"]
    speeds = [record["wps"] for kind, record in records if kind == "train_inner"]
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    best_update = checkpoint["optimizer_history"][-1]["num_updates"]
    at_best = [record for record in valid if record["num_updates"] == best_update]
    if not at_best:
        sys.exit(
            f"--models {run.name}: {log_path} has no validation at update {best_update}, "
            "where checkpoint_best is from"
        )
    cost = checkpoint_cost(str(checkpoint_path), str(data))
    perplexities, counts = read_evaluation(evaluation_path)
    command_path = run / "command.txt"
    curve = [(int(record["num_updates"]), record["ppl"]) for record in valid]

    row = {
        "arch": checkpoint["cfg"]["model"]["_name"],
        "name": run.name,
        "params": cost["params"],
        "active_params": cost["active_params"],
        "flops_per_token": cost["flops_per_token"],
        "valid_ppl": perplexities["valid"],
        "test_ppl": perplexities["test"],
        "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,
        **{key: at_best[-1].get(key) for key in LOAD_KEYS},
        "updates": curve[-1][0],
        "seed": checkpoint["cfg"]["common"]["seed"],
        "command": command_path.read_text().strip() if command_path.is_file() else None,
    }
    return row, curve, counts


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format a table of COLUMNS, the first one aligned to the left; `-` where there is no value."""
    cells = [[header for header, _ in COLUMNS.values()]] + [
        ["-" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def line_style(i: int) -> dict[str, Any]:
    """Return colour and dashes of the i-th curve: ten colours, then the same with dashes."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "--")[i // 10 % 2]}


def png(figure: Figure) -> bytes:
    """Return the bytes of a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def plot_perplexity(
    curves: dict[str, list[tuple[int, float]]], levels: dict[str, float], data_name: str
) -> bytes:
    """Draw a validation curve for each model, and a level for each n-gram model.

    A level above all curves is left out, as it would squash them.

    Returns:
        The bytes of a PNG.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        updates, perplexities = zip(*curve, strict=True)
        axes.plot(updates, perplexities, marker=".", label=name, **line_style(i))
    top = max(perplexity for curve in curves.values() for _, perplexity in curve)
    for (name, level), color in zip(levels.items(), ("gray", "black"), strict=True):
        if level <= top:
            axes.axhline(level, linestyle=":", color=color, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("updates")
    axes.set_ylabel("validation perplexity per token")
    axes.set_title(data_name)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return png(figure)


def block_load_figure(counts: dict[str, dict[str, list[int]]]) -> Figure:
    """Draw the load of the blocks of each model, a panel for each sparse layer.

    Args:
        counts: model -> number of a sparse layer -> tokens of its blocks.
    """
    layers = sorted({layer for of_model in counts.values() for layer in of_model}, key=int)
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for layer, axes in zip(layers, panels, strict=True):
        for i, (name, of_model) in enumerate(counts.items()):
            if tokens := sorted(of_model.get(layer, ()), reverse=True):
                mean = sum(tokens) / len(tokens)
                shares = [block / len(tokens) for block in range(len(tokens) + 1)]
                axes.stairs(
                    [count / mean for count in tokens],
                    shares,
                    label=name,
                    baseline=None,
                    **line_style(i),
                )
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_ylim(bottom=LEAST_LOAD)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("blocks, the most loaded first")
        axes.set_title(f"layer {layer}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("load / mean load")
    panels[-1].legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, required=True, help="directory of the models' directories"
    )
    parser.add_argument("--data", type=Path, required=True, help="output of fairseq-preprocess")
    parser.add_argument("--models", nargs="+", default=["dense", "hash_layer", "switch", "avgk"])
    parser.add_argument(
        "--data-name", default="State of the Union addresses", help="title of the figure"
    )
    args = parser.parse_args(argv)
    if not args.runs.is_dir():
        sys.exit(f"--runs {args.runs}: no such directory")

    models, curves, counts = [], {}, {}
    for name in args.models:
        row, curves[name], counts[name] = model_result(args.runs / name, args.data)
        models.append(row)
    ngrams = ngram_rows(args.data)
    rows = [dict.fromkeys(RESULT_KEYS) | {"name": row["arch"]} | row for row in ngrams] + models

    write_atomically(args.runs / "results.json", json.dumps(rows, indent=2).encode() + b"\n")
    levels = {row["arch"]: row["valid_ppl"] for row in ngrams}
    write_atomically(args.runs / "perplexity.png", plot_perplexity(curves, levels, args.data_name))
    if any(counts.values()):
        write_atomically(args.runs / "block_load.png", png(block_load_figure(counts)))
    print(format_table(rows))


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    main()
