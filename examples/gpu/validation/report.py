"""The table and the JSON file of a run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .runner import Result

ROOT = Path(__file__).parents[3]
MOST_FAULTS = 20
"""Largest number of failed checks of a point that the table shows."""


def environment(device: str) -> dict[str, Any]:
    """Return card, versions, commit and date."""
    result: dict[str, Any] = {"card": None, "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result["card"] = properties.name
        result["capability"] = f"{properties.major}.{properties.minor}"
        result["memory_bytes"] = properties.total_memory
        result["cards"] = torch.cuda.device_count()
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in ("triton", "numpy", "ve-fairseq", "fairscale", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {**result, "versions": versions, "commit": commit(), "cores": os.cpu_count()}


def commit() -> str | None:
    """Return the project's commit, marked if files differ from it; ``None`` without a
    repository."""

    def git(*arguments: str) -> str:
        try:
            command = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "fairseq_sffn", "examples")
    return head + "-changed" * bool(changed) if head else None


def without_paths(text: str, folder: Path) -> str:
    """Remove this machine's folders from a text, as results are published."""
    for name, path in (("RUN", folder), ("PROJECT", ROOT), ("HOME", Path.home())):
        text = text.replace(str(path.resolve()), name).replace(str(path), name)
    text = re.sub(r"[^\s\"'=:]*/site-packages/", "site-packages/", text)
    return text.replace(sys.base_prefix, "PYTHON").replace(sys.prefix, "PYTHON")


def write(path: Path, folder: Path, results: list[Result], about: dict[str, Any]) -> None:
    """Write the JSON file. It is called after each point, so a run that ends early leaves a
    file."""
    points = {result.point.name: result.to_json() for result in results}
    text = json.dumps({**about, "goals": goals(results), "points": points}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(without_paths(text, folder) + "\n")
    os.replace(temporary, path)


def goals(results: list[Result]) -> list[dict[str, Any]]:
    """Return each point with a goal: its ratio to the dense model, and whether it meets the
    goal."""
    return [
        {name: row[name] for name in ("what", "ratio", "goal", "met")}
        for result in results
        for row in result.rows
        if "goal" in row
    ]


def table(results: list[Result]) -> str:
    """Format a line for each point, the failed checks, and the goals."""
    lines = [f"{'point':<12} {'status':<9} {'passed':>6} {'failed':>6} {'seconds':>7}"]
    for result in results:
        counts = f"{result.count(True):>6} {result.count(False):>6} {result.seconds:>7.1f}"
        lines.append(f"{result.point.name:<12} {result.status:<9} {counts}")
    for result in results:
        bad = [row for row in result.rows if row["passed"] is False]
        lines += [f"FAILED {result.point.name}: {fault(row)}" for row in bad[:MOST_FAULTS]]
        if len(bad) > MOST_FAULTS:
            lines.append(f"FAILED {result.point.name}: {len(bad) - MOST_FAULTS} more")
        if result.error:
            lines.append(f"{result.status.upper()} {result.point.name}: {result.error.strip()}")
        lines += [
            f"skipped: {row['what']}: {row['skipped']}" for row in result.rows if "skipped" in row
        ]
    for goal in goals(results):
        verdict = "met" if goal["met"] else "MISSED"
        lines.append(
            f"{goal['what']}: {goal['ratio']:.2f} times dense, goal {goal['goal']:g}: {verdict}"
        )
    return "\n".join(lines)


def markdown(made: dict[str, Any]) -> str:
    """Format the times of a JSON file as a Markdown table, under a line that describes the
    machine."""
    versions = made["versions"]
    about = [made["card"] or made["mode"], f"torch {versions['torch']}"]
    about += [f"triton {versions['triton']}", f"commit {made['commit']}", made["date"]]
    lines = [", ".join(about) + ".", "", "| what | times dense | goal | ms |", "| --- " * 4 + "|"]
    for point in made["points"].values():
        for row in point["rows"]:
            if "ratio" not in row:
                continue
            seconds = row.get("figures", {}).get("seconds")
            milliseconds = f"{1000 * seconds['median']:.3g}" if seconds else ""
            goal = f"{row['goal']:g}" if "goal" in row else ""
            lines.append(f"| {row['what']} | {row['ratio']:.2f} | {goal} | {milliseconds} |")
    return "\n".join(lines)


def fault(row: dict[str, Any]) -> str:
    """Describe a failed check in a line."""
    parts = [row["what"]]
    if "value" in row:
        parts.append(f"{row['value']} where {row['limit']} is allowed")
    parts += [str(row[name]) for name in ("worst", "faults", "error", "differ") if row.get(name)]
    return "; ".join(parts)
