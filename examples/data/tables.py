"""Prints the tables of README.md from a manifest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept_documents(manifest: dict[str, Any], name: str) -> str:
    """Return how many documents of a source were read and used, in all splits together."""
    used = sum(
        split["sources"].get(name, {"documents": 0})["documents"]
        for split in manifest["splits"].values()
    )
    return f"{manifest['documents'][name]['documents_read']:,} | {used:,}"


def sources_table(manifest: dict[str, Any]) -> str:
    head = ["source", "package", "version", "MB", "licence", "documents read", "used"]
    rows = [
        [
            name,
            f"{source['registry']} `{source['package']}`",
            source["version"] or "-",
            f"{source['bytes'] / 1e6:.1f}",
            source["licence"],
            kept_documents(manifest, name),
        ]
        for name, source in manifest["sources"].items()
    ]
    return table(head, rows)


def splits_table(manifest: dict[str, Any]) -> str:
    head = ["split", "documents", "paragraphs", "words", "bytes", "tokens"]
    keys = head[1:]
    rows = [
        [f"`{name}`", *(f"{split[key]:,}" for key in keys)]
        for name, split in manifest["splits"].items()
    ]
    return table(head, rows)


def train_table(manifest: dict[str, Any]) -> str:
    """Make a table of the sources of the training split."""
    split = manifest["splits"]["train"]
    rows = []
    for name, source in split["sources"].items():
        share = f"{100 * source['tokens'] / split['tokens']:.1f}%"
        rows.append([name, f"{source['documents']:,}", f"{source['tokens']:,}", share])
    return table(["source", "documents", "tokens", "share"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    args = parser.parse_args(argv)
    manifest = json.loads(args.manifest.read_text(encoding="utf-8"))
    print(sources_table(manifest), splits_table(manifest), train_table(manifest), sep="\n\n")


if __name__ == "__main__":
    main()
