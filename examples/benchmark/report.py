"""Merges the parts of a benchmark into results.json, table.md and scaling.png.

Ratios are times in units of the dense FFN (or dense model) of the same size, median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timing import ROOT, fingerprint

GOALS = {
    **{("avgk", 1024): 1.10, ("avgk", 256): 1.25, ("avgk", 64): 1.6, ("avgk", 16): 3.3},
    ("vanilla_m", 1): 11.0,
}
"""(selector, block size) -> ratio to reach with one thread, N = 2048, d = 256."""

Part = dict[str, Any]


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of the measurement."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def commit() -> str:
    """Return the project's commit, marked if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "fairseq_sffn", "examples/benchmark")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-changed" if changed else "")


def read_parts(folder: Path) -> list[Part]:
    """Read the parts, each marked whether it belongs to the current code."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for part in parts:
        code = fingerprint(part["part"], of_project=part["part"] != "peers")
        part["current"] = part["settings"]["code"] == code
    return parts


def table(headers: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Format a Markdown table."""
    headers = list(headers)
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def show(ratio: dict[str, float] | None) -> str:
    """Format median and quartiles."""
    if ratio is None:
        return ""
    low, median, high = (f"{ratio[name]:.3g}" for name in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def of(parts: list[Part], name: str) -> list[Part]:
    return [part for part in parts if part["part"] == name]


def goals_table(parts: list[Part]) -> str:
    measured = {
        (row["selector"], row["block_size"]): row["ratio"]
        for part in of(parts, "layer")
        if part["settings"]["threads"] == 1 and part["settings"]["device"] == "cpu"
        if not part["settings"].get("glu")
        for row in part["rows"]
        if (row["tokens"], row["width"], row["skewed"]) == (2048, 256, False)
    }
    rows = [
        (selector, g, f"{goal:.2f}", show(measured.get((selector, g))) or "not measured")
        for (selector, g), goal in GOALS.items()
    ]
    return table(["selector", "g", "goal", "measured"], rows)


def layer_tables(parts: list[Part]) -> str:
    """Make a table for each size and device, with a column for each number of threads."""
    sizes: dict[tuple[str, int, int], dict[int, list[dict[str, Any]]]] = {}
    for part in of(parts, "layer"):
        settings = part["settings"]
        device = part["gpu"] or settings["device"]
        if settings.get("dtype", "fp32") != "fp32":
            device += f", {settings['dtype']}"
        if glu := settings.get("glu"):
            device += f", gated cells ({glu})"
        key = device, settings["tokens"], settings["width"]
        sizes.setdefault(key, {})[settings["threads"]] = part["rows"]
    texts = []
    for (device, tokens, width), by_threads in sorted(sizes.items(), key=lambda item: item[0][1:]):
        lines: dict[tuple[Any, ...], dict[int, Any]] = {}
        for threads, rows in sorted(by_threads.items()):
            for row in rows:
                name = row["selector"] + (", skewed" if row["skewed"] else "")
                key = name, row["block_size"], row["active_cells"]
                lines.setdefault(key, {})[threads] = row["ratio"]
        counts = sorted(by_threads)
        headers = ["selector", "g", "active cells", *(f"threads: {n}" for n in counts)]
        body = [[*key, *(show(ratios.get(n)) for n in counts)] for key, ratios in lines.items()]
        dense = ", ".join(
            f"{1000 * by_threads[n][0]['base_seconds']['median']:.0f} ms (threads: {n})"
            for n in counts
        )
        texts.append(
            f"N = {tokens}, d = {width}, {device}; the dense FFN takes {dense}\n\n"
            + table(headers, body)
        )
    return "\n\n".join(texts)


def memory_table(part: Part) -> str:
    names = ("saved", "live", "peak", "temporary")

    def cell(row: dict[str, Any], name: str) -> str:
        ratio = f" ({row[f'{name}_ratio']:.2f})" if f"{name}_ratio" in row else ""
        return f"{row[name] / 2**20:.1f}{ratio}"

    rows = [
        [row["selector"], row["block_size"] or "", *(cell(row, name) for name in names)]
        for row in part["rows"]
    ]
    return table(["selector", "g", *(f"{name}, MiB" for name in names)], rows)


def selection_table(part: Part) -> str:
    rows = [
        [row["what"], row["selector"], row["block_size"] or "", show(row["ratio"])]
        for row in part["rows"]
    ]
    return table(["what", "selector", "g", "share"], rows)


def train_table(part: Part) -> str:
    dense = {row["optimizer"]: row["dense_tokens_per_second"] for row in part["rows"]}
    rows = [["dense", name, f"{speed:,.0f}", "1"] for name, speed in dense.items()]
    rows += [
        [row["model"], row["optimizer"], f"{row['tokens_per_second']:,.0f}", show(row["ratio"])]
        for row in part["rows"]
    ]
    return table(["model", "optimizer", "tokens/s", "step's time / dense"], rows)


def processes_table(part: Part) -> str:
    lines: dict[str, list[list[Any]]] = {}
    for row in part["rows"]:
        alone = [row["model"], 1, "", "", f"{row['base_tokens_per_second']:,.0f}", "1", "", ""]
        sent = f"{row['sent_bytes'] / 2**20:.1f}" if "sent_bytes" in row else ""
        speed, shards = f"{row['tokens_per_second']:,.0f}", row["expert_parallel"]
        between = speed, show(row["speedup"]), show(row.get("ratio")), sent
        own = [row["model"], row["processes"], row["ddp_backend"], shards, *between]
        lines.setdefault(row["model"], [alone]).append(own)
    headers = ["model", "processes", "--ddp-backend", "--sffn-expert-parallel", "tokens/s"]
    headers += ["to 1 process", "step's time / data parallel", "sent for tokens, MiB"]
    return table(headers, [line for of_model in lines.values() for line in of_model])


def decode_tables(part: Part) -> str:
    """Make a table for each width and mode, with a column for each number of tokens."""
    texts = []
    for width, mode in dict.fromkeys((row["width"], row["mode"]) for row in part["rows"]):
        rows = [row for row in part["rows"] if (row["width"], row["mode"]) == (width, mode)]
        counts = list(dict.fromkeys(row["tokens"] for row in rows))
        dense = {row["tokens"]: row["dense_tokens_per_second"] for row in rows}
        lines: dict[tuple[str, Any], list[str]] = {
            ("dense", ""): [f"{dense[count]:,.0f}" for count in counts]
        }
        for row in rows:
            cell = f"{row['tokens_per_second']:,.0f} ({row['ratio']['median']:.2f})"
            lines.setdefault((row["selector"], row["block_size"]), []).append(cell)
        headers = ["selector", "g", *(f"tokens at a time: {count}" for count in counts)]
        texts.append(
            f"d = {width}, {mode}\n\n"
            + table(headers, [[*key, *cells] for key, cells in lines.items()])
        )
    return "\n\n".join(texts)


def scaling_table(part: Part) -> str:
    rows = [
        [
            *(row["axis"], row[row["axis"]], show(row["ratio"])),
            f"{row['selection']['median'] / row['base_seconds']['median']:.2f}",
        ]
        for row in part["rows"]
    ]
    return table(["axis", "value", "layer / dense", "its selection / dense"], rows)


def tables_table(part: Part) -> str:
    rows = [[row["product"], row["way"], show(row["ratio"])] for row in part["rows"]]
    return table(["product", "in parts, with", "to one product"], rows)


def peers_table(part: Part) -> str:
    rows = [
        [
            *(f"{row['package']} {row['version']}", row["layer"], row["active"]),
            *(row.get("active_cells", ""), row.get("dense_cells", "")),
            row["error"] if "error" in row else show(row["ratio"]),
        ]
        for row in part["rows"]
    ]
    headers = ["package", "layer", "how", "active cells", "cells of the dense FFN", "ratio"]
    return table(headers, rows)


SECTIONS = {
    "memory": ("Memory of a layer, N = 2048, d = 256 (and in units of dense)", memory_table),
    "selection": ("Selection and optimizer, in units of dense forward + backward", selection_table),
    "train_step": ("A step of fairseq-train, `_tiny`, 4096 tokens", train_table),
    "processes": (
        "2 processes on these cores against 1, a step of fairseq-train, `_tiny`, 4096 tokens each",
        processes_table,
    ),
    "decode": ("Decoding: tokens/s (and time in units of dense)", decode_tables),
    "scaling": ("Avg-K, g = 64, d = 256, against N, k and E", scaling_table),
    "tables": ("What large tables cost: 16 products of 128 tokens, 1024 x 256", tables_table),
    "peers": ("Other libraries, N = 2048, d = 256, E = 16", peers_table),
}


def report(parts: list[Part], about: dict[str, Any]) -> str:
    """Render all tables as Markdown."""
    repeats = sorted({part["settings"]["repeats"] for part in parts})
    facts = [
        f"{about['cpu']}, {about['cores']} cores; torch {', '.join(about['torch'])}",
        f"commit {about['commit']}, {', '.join(about['dates'])}, seed {about['seed']}",
        f"repeats: {', '.join(map(str, repeats))}; `{about['command']}`",
    ]
    kernels = {part["settings"].get("kernels") for part in parts} - {None}
    facts += [f"C++ kernels: {'yes' if used else 'no'}" for used in sorted(kernels)]
    texts = ["# Benchmark", ".\n".join(facts) + "."]
    texts.append(
        "Ratio to dense: median (first to third quartile). PKM's 128 active cells are compared "
        "with a dense FFN of 4d, as all others are."
    )
    if stale := sorted({part["part"] for part in parts if not part["current"]}):
        texts.append(f"Measured with other code than this commit's: {', '.join(stale)}.")
    if of(parts, "layer"):
        texts += ["## Goals: one thread, N = 2048, d = 256, forward + backward", goals_table(parts)]
        texts += ["## Layer, forward + backward, selection included", layer_tables(parts)]
    for name, (title, make) in SECTIONS.items():
        for part in of(parts, name):
            texts += [f"## {title}; threads: {part['settings']['threads']}", make(part)]
    return "\n\n".join(texts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="directory that has parts/*.json")
    parser.add_argument("--command", default="bash examples/benchmark.sh", help="what made them")
    args = parser.parse_args(argv)
    parts = read_parts(args.runs / "parts")
    if not parts:
        sys.exit(f"--runs {args.runs}: no parts/*.json there")
    about = {
        **machine(),
        "torch": sorted({part["torch"] for part in parts}),
        "commit": commit(),
        "dates": sorted({part["date"] for part in parts}),
        "seed": parts[0]["seed"],
        "command": args.command,
        "minutes": round(sum(part["minutes"] for part in parts), 1),
    }
    text = report(parts, about)
    (args.runs / "results.json").write_text(json.dumps({**about, "parts": parts}, indent=1) + "\n")
    (args.runs / "table.md").write_text(text)
    for part in of(parts, "scaling"):
        from scaling import write_plot  # the figure needs the project, the tables do not

        logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
        write_plot(part, args.runs / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
