"""Builds train, valid and test from a folder of text files, in the form of the laptop corpus."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import corpus
import readers
from files import (
    check_at_least_1,
    make_output,
    read_documents,
    sha256,
    write_documents,
    write_json,
)

NAME = "folder"


def text_files(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, in order of name, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_folder(output: Path, folder: Path, paths: list[Path]) -> dict[str, int]:
    documents: list[readers.Document] = []
    for path in paths:
        try:
            data = path.read_bytes()
            data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"{path}: not a readable file of UTF-8 text: {error}")
        documents += readers.read_text(path.relative_to(folder).as_posix(), data)
    write_documents(output / f"work/read/{NAME}.jsonl", documents)
    return {"files": len(paths), "documents": len(documents)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of UTF-8 text; a file is a document")
    parser.add_argument("output", type=Path, help="folder to build in")
    parser.add_argument("--pieces", type=int, default=4096, help="of the SentencePiece model")
    parser.add_argument("--valid-share", type=float, default=0.03, help="of all characters")
    parser.add_argument("--test-share", type=float, default=0.03, help="of all characters")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=1, help="decides which files are held out")
    args = parser.parse_args(argv)

    for flag, value in (("--pieces", args.pieces), ("--workers", args.workers)):
        check_at_least_1(flag, value)
    for flag, share in (("--valid-share", args.valid_share), ("--test-share", args.test_share)):
        if not 0 < share < 0.5:
            sys.exit(f"{flag} {share:g}: must be more than 0 and less than 0.5")
    if not args.folder.is_dir():
        sys.exit(f"{args.folder}: not a folder")
    if args.output.resolve().is_relative_to(args.folder.resolve()):
        sys.exit(f"{args.output}: is in the folder that is read")
    paths = text_files(args.folder)
    if not paths:
        sys.exit(f"{args.folder}: has no files")
    make_output(args.output)

    history = [[[str(p.relative_to(args.folder)), sha256(p)] for p in paths], corpus.code(readers)]
    read = args.output / f"work/read/{NAME}.jsonl"
    corpus.source_steps(args.output, NAME).run(
        f"read-{NAME}", history, [read], lambda: read_folder(args.output, args.folder, paths)
    )
    documents = read_documents(read)
    characters = sum(len(text) for _, text in documents)
    settings = corpus.Settings(
        pieces=args.pieces,
        valid_characters=round(args.valid_share * characters),
        test_characters=round(args.test_share * characters),
        max_document_share=1.0,
        domain_tokens=0,
        seed=args.seed,
    )
    source = corpus.Source(NAME, "train", listings=False, history=history)
    try:
        manifest = corpus.build(args.output, [source], settings, args.workers)
    except ValueError as error:
        sys.exit(f"{args.folder}: {error}")
    write_json(args.output / "manifest.json", manifest)
    corpus.print_figures(manifest)


if __name__ == "__main__":
    main()
