"""Makes the quickstart's table, results.json and perplexity.png, with n-gram models as baselines.

It reads from each model's directory RUNS/NAME: train.log (fairseq-train with --log-format json),
eval_valid.log and eval_test.log (fairseq-eval-lm), checkpoints/checkpoint_best.pt and, if it
exists, command.txt. All figures of a model belong to checkpoint_best, except its speed and its
curve.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from ngram import ngram_rows, write_atomically

from fairseq_sffn.tools.cost import checkpoint_cost
from fairseq_sffn.tools.training_log import log_records

EVAL_RESULT = re.compile(r"Loss \(base 2\): \S+, Perplexity: (\S+)")

LOAD_KEYS = ("load_max", "unused_blocks", "load_entropy")
RESULT_KEYS = (
    *("arch", "name", "params", "active_params", "flops_per_token", "valid_ppl", "test_ppl"),
    *("tokens_per_second", *LOAD_KEYS, "updates", "seed", "command"),
)

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


def eval_perplexity(path: Path) -> float:
    """Return the perplexity per token that fairseq-eval-lm logged."""
    match = EVAL_RESULT.search(path.read_text(encoding="utf-8"))
    if match is None:
        sys.exit(
            f"--models {path.parent.name}: {path} has no perplexity; did fairseq-eval-lm finish?"
        )
    return float(match[1])


def model_result(run: Path, data: Path) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Read the results of a model.

    `updates` is the number for the whole run. `tokens_per_second` is the median over the training
    log without its first record, which includes the start-up.

    Returns:
        A row with RESULT_KEYS, and a curve of (updates, validation perplexity).
    """
    log_path, checkpoint_path = run / "train.log", run / "checkpoints" / "checkpoint_best.pt"
    evals = {split: run / f"eval_{split}.log" for split in ("valid", "test")}
    for path in (log_path, checkpoint_path, *evals.values()):
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
    command_path = run / "command.txt"
    curve = [(int(record["num_updates"]), record["ppl"]) for record in valid]

    row = {
        "arch": checkpoint["cfg"]["model"]["_name"],
        "name": run.name,
        "params": cost["params"],
        "active_params": cost["active_params"],
        "flops_per_token": cost["flops_per_token"],
        "valid_ppl": eval_perplexity(evals["valid"]),
        "test_ppl": eval_perplexity(evals["test"]),
        "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None,
        **{key: at_best[-1].get(key) for key in LOAD_KEYS},
        "updates": curve[-1][0],
        "seed": checkpoint["cfg"]["common"]["seed"],
        "command": command_path.read_text().strip() if command_path.is_file() else None,
    }
    return row, curve


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


def plot_perplexity(
    curves: dict[str, list[tuple[int, float]]], levels: dict[str, float], data_name: str
) -> bytes:
    """Draw a validation curve for each model, and a dashed level for each n-gram model.

    A level above all curves is left out, as it would squash them.

    Returns:
        The bytes of a PNG.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        updates, perplexities = zip(*curve, strict=True)
        axes.plot(updates, perplexities, marker=".", label=name)
    top = max(perplexity for curve in curves.values() for _, perplexity in curve)
    for (name, level), color in zip(levels.items(), ("gray", "black"), strict=True):
        if level <= top:
            axes.axhline(level, linestyle="--", color=color, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("updates")
    axes.set_ylabel("validation perplexity per token")
    axes.set_title(data_name)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


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

    models, curves = [], {}
    for name in args.models:
        row, curves[name] = model_result(args.runs / name, args.data)
        models.append(row)
    ngrams = ngram_rows(args.data)
    rows = [dict.fromkeys(RESULT_KEYS) | {"name": row["arch"]} | row for row in ngrams] + models

    write_atomically(args.runs / "results.json", json.dumps(rows, indent=2).encode() + b"\n")
    levels = {row["arch"]: row["valid_ppl"] for row in ngrams}
    write_atomically(args.runs / "perplexity.png", plot_perplexity(curves, levels, args.data_name))
    print(format_table(rows))


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    main()
