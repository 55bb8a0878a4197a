"""List the plugin's changes of fairseq's own code, with reasons."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from ..patches import PATCHES
from ..patches.registry import WRITTEN_FOR, Patch

WIDTH = 98


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn patches``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> str:
    """Return what ``fairseq-sffn patches`` prints."""
    rows = [as_row(each) for each in sorted(PATCHES, key=lambda each: each.target)]
    return json.dumps(rows) if args.json else format_rows(rows)


def as_row(each: Patch) -> dict[str, Any]:
    """Return a patch as a dictionary for JSON.

    Returns:
        The attributes of the patch; ``fits``: whether the patch was written for the installed
        fairseq; ``fingerprint``: the hash of the target's source, ``None`` if there is no source.
    """
    return {
        "target": each.target,
        "module": each.replace.__module__,
        "kind": each.kind,
        "why": each.why,
        "until": each.until,
        "fits": each.fits(),
        "fingerprint": each.found(),
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return a paragraph for each patch and a line with the total, as text."""
    lines = []
    for row in rows:
        lines += [row["target"], f"  {row['kind']}; {row['module']}"]
        for name in ("why", "until"):
            lines += textwrap.wrap(
                f"{name}: {row[name]}", WIDTH, initial_indent="  ", subsequent_indent="    "
            )
        if not row["fits"]:
            lines.append(f"  its source ({row['fingerprint']}) is not that of {WRITTEN_FOR}")
    count = sum(row["fits"] for row in rows)
    return "\n".join([*lines, f"{count} of {len(rows)} targets are as in {WRITTEN_FOR}"])
