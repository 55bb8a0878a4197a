"""Makes binarised splits and domains with a manifest from documents that were read.

Reads OUTPUT/work/read/SOURCE.jsonl. Writes to OUTPUT: text/ and bin/ with train, valid and test,
text/domains/ and domains/ with a test set a domain, spm.model, dict.txt and manifest.json.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import clean
import deduplicate
import encode
import files
import ngrams
import sentencepiece
import splits
from files import Steps, read_documents, sha256, write_documents
from splits import Documents

HELD_OUT = ("valid", "test")
STEPS = ("deduplicate", "split", "encode", "check", "binarise")  # after the steps of each source
PACKAGES = ("sentencepiece", "lxml", "numpy", "ve-fairseq")


@dataclass(frozen=True)
class Settings:
    """Settings that determine how a collection is split and encoded."""

    pieces: int  # of the SentencePiece model
    valid_characters: int
    test_characters: int
    max_document_share: float  # largest share of valid and of test that one document may have
    domain_tokens: int
    seed: int


@dataclass(frozen=True)
class Source:
    """The documents that were read from one package or folder."""

    name: str
    role: str  # "train", or "domain" for a test set of its own
    listings: bool  # whether rows of short paragraphs are text
    history: Any  # the settings that determined what was read


def code(*modules: Any) -> list[str]:
    """Hash modules and this one, as their code is a setting of the steps that they do."""
    paths = [__file__, files.__file__, *(module.__file__ for module in modules)]
    return [sha256(Path(path)) for path in paths]


def source_steps(output: Path, name: str) -> Steps:
    """Return the steps of one source, and after them those of all sources together."""
    return Steps(output, [f"read-{name}", f"clean-{name}", *STEPS])


def clean_source(output: Path, source: Source) -> dict[str, int]:
    documents = read_documents(output / f"work/read/{source.name}.jsonl")
    kept, dropped = clean.clean_documents(documents, source.listings)
    write_documents(output / f"work/clean/{source.name}.jsonl", kept)
    return {"documents_read": len(documents), **dropped}


def clean_settings(source: Source) -> Any:
    return [source.history, source.listings, code(clean)]


def clean_step(output: Path, source: Source) -> dict[str, int]:
    """Clean a source and return counts of what was dropped, by reason."""
    return source_steps(output, source.name).run(
        f"clean-{source.name}",
        clean_settings(source),
        [output / f"work/clean/{source.name}.jsonl"],
        lambda: clean_source(output, source),
    )


def deduplicate_sources(output: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    seen = deduplicate.Deduplicator()
    report = {}
    for name in names:
        documents = read_documents(output / f"work/clean/{name}.jsonl")
        kept, dropped = seen.documents(documents, clean.MIN_DOCUMENT_LENGTH)
        report[name] = dropped | {"documents_kept": len(kept)}
        write_documents(output / f"work/distinct/{name}.jsonl", kept)
        print(f"   {name}: {len(kept):,} of {len(documents):,} documents", flush=True)
    return report


def dropped_documents(reports: Iterable[dict[str, int]]) -> str:
    """Say how many documents were dropped and why, as the end of a message."""
    least = clean.MIN_DOCUMENT_LENGTH
    reasons = {
        "short": f"with less than {least} characters of text",
        "no_prose": "with hardly any prose",
        "copies": "that are copies",
        "short_without_copied_paragraphs": f"with less than {least} characters that are no copy",
    }
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update({reason: report[reason] for reason in reasons})
    dropped = [f"{counts[key]:,} {reason}" for key, reason in reasons.items() if counts[key]]
    return f"; dropped were {', '.join(dropped)}" if dropped else ""


def check_documents(reports: dict[str, dict[str, int]], use: str) -> None:
    """Check that some documents are left.

    Raises:
        ValueError: no source has a document left.
    """
    if not any(report["documents_kept"] for report in reports.values()):
        read = sum(report["documents_read"] for report in reports.values())
        dropped = dropped_documents(reports.values())
        raise ValueError(f"no document of {read:,} is left for {use}{dropped}")


def named_documents(output: Path, stage: str, name: str) -> Documents:
    """Return the documents of a source, with names that are unique over all sources."""
    documents = read_documents(output / f"work/{stage}/{name}.jsonl")
    return [(f"{name}:{document}", text) for document, text in documents]


def split_sources(
    output: Path,
    train_names: list[str],
    domain_names: list[str],
    settings: Settings,
    dropped: str,
) -> dict[str, dict[str, int]]:
    """Split the training sources, and remove the text of train from everything else.

    Args:
        dropped: end of the message if there are too few documents.

    Raises:
        ValueError: nothing is left to evaluate on.
    """
    collection = [d for name in train_names for d in named_documents(output, "distinct", name)]
    sizes = {"valid": settings.valid_characters, "test": settings.test_characters}
    share = settings.max_document_share
    try:
        dealt = splits.split_documents(collection, sizes, share, settings.seed)
    except ValueError as error:
        raise ValueError(f"{error}{dropped}") from error
    held_out = {split: dealt[split] for split in HELD_OUT}
    held_out |= {name: named_documents(output, "distinct", name) for name in domain_names}
    overlap = ngrams.Overlap((text for _, text in dealt["train"]), splits.OVERLAP_NGRAM)
    report = {}
    for name, documents in held_out.items():
        rest, report[name] = splits.remove_overlap(documents, overlap)
        if not rest:
            common = overlap.common(documents[0][1])
            raise ValueError(
                f"nothing is left for {name}, whose every paragraph shares {splits.OVERLAP_NGRAM} "
                f'consecutive words with train: take out of the texts what repeats, as "{common}"'
            )
        write_documents(output / f"work/split/{name}.jsonl", rest)
    write_documents(output / "work/split/train.jsonl", dealt["train"])
    return report


def lines_of(documents: Documents) -> list[str]:
    return [line for _, text in documents for line in text.split("\n")]


def encode_split(
    output: Path,
    tokenizer: sentencepiece.SentencePieceProcessor,
    documents: Documents,
    name: str,
) -> list[str]:
    """Write text and pieces, and return the pieces."""
    lines = lines_of(documents)
    encoded = encode.encode_lines(tokenizer, lines)
    encode.write_lines(output / f"text/{name}.txt", lines)
    encode.write_lines(output / f"work/encoded/{name}.bpe", encoded)
    return encoded


def figures(documents: Documents, encoded: list[str]) -> dict[str, Any]:
    """Count documents and tokens of a split. Each line has an end-of-line token."""
    lines = lines_of(documents)
    sources: dict[str, dict[str, int]] = {}
    tokens = iter([len(line.split()) + 1 for line in encoded])
    for name, text in documents:
        source = sources.setdefault(name.partition(":")[0], {"documents": 0, "tokens": 0})
        source["documents"] += 1
        source["tokens"] += sum(next(tokens) for _ in text.split("\n"))
    return {
        "documents": len(documents),
        "paragraphs": len(lines),
        "characters": sum(map(splits.size, lines)),
        "bytes": sum(len(line.encode("utf-8")) + 1 for line in lines),
        "words": sum(len(line.split()) for line in lines),
        "tokens": sum(source["tokens"] for source in sources.values()),
        "sources": sources,
    }


def encode_splits(output: Path, domain_names: list[str], settings: Settings) -> dict[str, Any]:
    """Train the tokenizer on train, cut the domains, and encode everything."""

    def documents_of(name: str) -> Documents:
        return read_documents(output / f"work/split/{name}.jsonl")

    report = {}
    train = documents_of("train")
    model = encode.train_sentencepiece(lines_of(train), settings.pieces, settings.seed)
    files.write_atomically(output / "spm.model", model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    print("   tokenizer trained", flush=True)
    encoded = encode_split(output, tokenizer, train, "train")
    dictionary = encode.dictionary_text(tokenizer, encoded)
    files.write_atomically(output / "dict.txt", dictionary.encode("utf-8"))
    report["train"] = figures(train, encoded)
    for split in HELD_OUT:
        documents = documents_of(split)
        report[split] = figures(documents, encode_split(output, tokenizer, documents, split))
    for name in domain_names:
        documents = documents_of(name)
        tokens = {
            document: [len(p) + 1 for p in tokenizer.encode(text.split("\n"))]
            for document, text in documents
        }
        cut = splits.cut_documents(documents, tokens, settings.domain_tokens, settings.seed)
        path = f"domains/{name}"
        report[path] = figures(cut, encode_split(output, tokenizer, cut, path))
        print(f"   {name}: {report[path]['tokens']:,} tokens", flush=True)
    return report


def check_overlap(output: Path, names: list[str]) -> dict[str, Any]:
    """Compare the finished texts.

    Raises:
        ValueError: they overlap.
    """

    def lines(name: str) -> list[str]:
        return (output / f"text/{name}.txt").read_text(encoding="utf-8").splitlines()

    held_out = {name: lines(name) for name in names}
    n = splits.OVERLAP_NGRAM
    return {
        "words_in_common": n,
        "training_paragraphs_compared": splits.check_no_overlap(lines("train"), held_out, n),
        "held_out_paragraphs_compared": sum(map(len, held_out.values())),
        "found": 0,
    }


def binarised(output: Path, domain_names: list[str]) -> dict[str, Path]:
    """Return FOLDER/SPLIT of each split that fairseq-preprocess makes."""
    domains = {f"domains/{name}": output / f"domains/{name}/test" for name in domain_names}
    return {split: output / f"bin/{split}" for split in ("train", *HELD_OUT)} | domains


def binarise(output: Path, domain_names: list[str], workers: int) -> dict[str, dict[str, str]]:
    """Run fairseq-preprocess and return the checksums of its files."""
    encoded = output / "work/encoded"
    prefixes = {split: encoded / f"{split}.bpe" for split in ("train", *HELD_OUT)}
    encode.binarise(output / "dict.txt", prefixes, output / "bin", workers)
    for name in domain_names:
        prefix = {"test": encoded / f"domains/{name}.bpe"}
        encode.binarise(output / "dict.txt", prefix, output / f"domains/{name}")
    return {
        name: {
            "text_sha256": sha256(output / f"text/{name}.txt"),
            "bin_sha256": sha256(path.with_suffix(".bin")),
            "idx_sha256": sha256(path.with_suffix(".idx")),
        }
        for name, path in binarised(output, domain_names).items()
    }


def build(output: Path, sources: list[Source], settings: Settings, workers: int) -> dict[str, Any]:
    """Run all steps after reading that are not done yet, and return the manifest's figures.

    If several sources share a text, a training source keeps it, and the first of several such
    sources.
    """
    steps = Steps(output, STEPS)
    train_names = [source.name for source in sources if source.role == "train"]
    domain_names = [source.name for source in sources if source.role == "domain"]
    made = binarised(output, domain_names)

    def work(stage: str, names: Iterable[str], ending: str = "jsonl") -> list[Path]:
        return [output / f"work/{stage}/{name}.{ending}" for name in names]

    cleaned = {source.name: clean_step(output, source) for source in sources}
    history: list[Any] = [[s.name, s.role, clean_settings(s)] for s in sources]

    history = [history, code(deduplicate, ngrams, clean)]
    distinct = steps.run(
        "deduplicate",
        history,
        work("distinct", train_names + domain_names),
        lambda: deduplicate_sources(output, train_names + domain_names),
    )
    documents = {name: cleaned[name] | distinct[name] for name in cleaned}
    training = {name: documents[name] for name in train_names}
    check_documents(training, "train")
    for name in domain_names:
        check_documents({name: documents[name]}, name)
    dropped = dropped_documents(training.values())
    history = [history, asdict(settings), code(splits, ngrams)]
    overlapping = steps.run(
        "split",
        history,
        work("split", ["train", *HELD_OUT, *domain_names]),
        lambda: split_sources(output, train_names, domain_names, settings, dropped),
    )
    history = [history, code(encode, splits), version("sentencepiece")]
    texts = [output / f"text/{name}.txt" for name in made]
    report = steps.run(
        "encode",
        history,
        [output / "spm.model", output / "dict.txt", *texts, *work("encoded", made, "bpe")],
        lambda: encode_splits(output, domain_names, settings),
    )
    held_out = [name for name in report if name != "train"]
    checked = steps.run("check", history, [], lambda: check_overlap(output, held_out))
    checksums = steps.run(
        "binarise",
        history,
        encode.binarised_files(made.values()),
        lambda: binarise(output, domain_names, workers),
    )
    for name in report:
        report[name] |= checksums[name]
        report[name] |= overlapping.get(name.removeprefix("domains/"), {})
    return {
        "settings": asdict(settings),
        "sentencepiece": encode.SENTENCEPIECE | {"sample_characters": encode.SAMPLE},
        "splits": report,
        "documents": documents,
        "overlap_check": checked,
        "spm.model_sha256": sha256(output / "spm.model"),
        "dict.txt_sha256": sha256(output / "dict.txt"),
        "versions": {
            "python": sys.version.split()[0],
            **{package: version(package) for package in PACKAGES},
        },
    }


def print_figures(manifest: dict[str, Any]) -> None:
    print(f"{'split':<26}{'documents':>10}{'words':>12}{'tokens':>12}")
    for name, split in manifest["splits"].items():
        print(f"{name:<26}{split['documents']:>10,}{split['words']:>12,}{split['tokens']:>12,}")
