"""Builds a corpus of technical documentation, with test sets of other domains, from packages."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import archives
import corpus
import fetch
import readers
from files import check_at_least_1, make_output, write_documents, write_json

HERE = Path(__file__).parent
SETTINGS = corpus.Settings(
    pieces=4096,
    valid_characters=340_000,
    test_characters=680_000,
    max_document_share=0.1,
    domain_tokens=60_000,
    seed=1,
)


def read_source(output: Path, source: fetch.Source, path: Path) -> dict[str, int]:
    """Read the documents of a fetched package."""
    documents: list[readers.Document] = []
    found = 0
    for name, data in archives.archive_files(path, source["files"], source.get("exclude", [])):
        found += 1
        documents += readers.read_file(source["reader"], source.get("options", {}), name, data)
    if not documents:
        sys.exit(f"{source['name']}: {path.name} has no documents at {source['files']}")
    write_documents(output / f"work/read/{source['name']}.jsonl", documents)
    return {"files": found, "documents": len(documents)}


def read_and_clean(output: Path, source: fetch.Source, path: Path, checksum: str) -> corpus.Source:
    name = source["name"]
    how = {key: source[key] for key in source.keys() - {"licence", "version"}}
    history = [how, checksum, corpus.code(archives, readers)]
    corpus.source_steps(output, name).run(
        f"read-{name}",
        history,
        [output / f"work/read/{name}.jsonl"],
        lambda: read_source(output, source, path),
    )
    collection = corpus.Source(name, source["role"], source.get("listings", False), history)
    corpus.clean_step(output, collection)
    return collection


def compare(manifest: dict[str, Any], expected: dict[str, Any]) -> str:
    """Say whether a corpus is the one that a manifest describes, and if not, where it differs."""
    keys = [key for key in manifest if key != "versions" and manifest[key] != expected.get(key)]
    if not keys:
        return "the same corpus as in laptop-manifest.json: every checksum agrees"
    packages = [
        f"{source['package']} {source['version']}"
        for name, source in manifest["sources"].items()
        if source["sha256"] != expected["sources"].get(name, {}).get("sha256")
    ]
    if packages:
        return (
            "not the corpus of laptop-manifest.json, since packages are others, as with another "
            f"Debian release; figures for it cannot be compared: {', '.join(packages)}"
        )
    return f"not the corpus of laptop-manifest.json, from the same packages: {', '.join(keys)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to build in")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--sources", type=Path, default=HERE / "sources.json")
    parser.add_argument("--reference", type=Path, default=HERE / "laptop-manifest.json")
    args = parser.parse_args(argv)

    check_at_least_1("--workers", args.workers)
    make_output(args.output)
    sources = {source["name"]: source for source in json.loads(args.sources.read_text())}
    reference = json.loads(args.reference.read_text())
    for name, package in reference["sources"].items():
        if package["registry"] == "debian" and name in sources:
            sources[name]["reference"] = package["package"], package["version"]
    packages, paths = {}, {}
    for i, (name, source) in enumerate(sources.items(), 1):
        paths[name], packages[name] = fetch.fetch(source, args.output / "downloads", HERE)
        package = packages[name]
        megabytes = package["bytes"] / 1e6
        print(
            f"{i:2}/{len(sources)} {package['package']} {package['version']} ({megabytes:.1f} MB)",
            flush=True,
        )
    with ProcessPoolExecutor(args.workers) as pool:
        futures = [
            pool.submit(read_and_clean, args.output, source, paths[name], packages[name]["sha256"])
            for name, source in sources.items()
        ]
        collections = [future.result() for future in futures]
    try:
        built = corpus.build(args.output, collections, SETTINGS, args.workers)
    except ValueError as error:
        sys.exit(f"{args.output}: {error}")
    keys = ("registry", "licence", "role")
    manifest = {
        "sources": {
            name: {key: source[key] for key in keys} | packages[name]
            for name, source in sources.items()
        },
        **built,
    }
    write_json(args.output / "manifest.json", manifest)
    corpus.print_figures(manifest)
    print(f"{args.output}: {compare(manifest, reference)}")


if __name__ == "__main__":
    main()
