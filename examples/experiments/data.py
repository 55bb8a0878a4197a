"""Checks the text and the zero-shot tasks of a scale."""

import hashlib
import shlex
from pathlib import Path

from fairseq.data import Dictionary

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools.zero_shot import build_encoder
from fairseq_sffn.tools.zero_shot_tasks import TASKS

from .files import Scale
from .plan import domains_of
from .results import IN_DOMAIN

SEE = "see examples/data/README.md"


def fingerprint(scale: Scale) -> str:
    """Hash the binarised text, in and out of domain, and its dictionary."""
    data, digest = Path(scale.data), hashlib.sha256()
    if scale.domains and not Path(scale.domains).is_dir():
        raise UsageError(f"{scale.domains}: there is no such folder; {SEE}")
    domains = list(domains_of(scale))
    splits = [data / "train", *(data / name for name in IN_DOMAIN)]
    splits += [domain / "test" for domain in domains]
    files = [data / "dict.txt", *(split.with_suffix(".bin") for split in splits)]
    indices = [split.with_suffix(".idx") for split in splits]
    for path in (*files, *indices, *(domain / "dict.txt" for domain in domains)):
        if not path.exists():
            raise UsageError(f"{path}: is missing; {SEE}")
    for domain in domains:
        if domain.name in IN_DOMAIN:
            raise UsageError(f"{domain}: {domain.name} is the name of a set in domain")
        if (domain / "dict.txt").read_bytes() != files[0].read_bytes():
            raise UsageError(f"{domain / 'dict.txt'}: is another dictionary than {files[0]}")
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if (types := len(Dictionary.load(str(files[0])))) != scale.dictionary:
        where = f"dictionary {scale.dictionary} of scale {scale.name}"
        raise UsageError(f"{where}: {files[0]} has {types} types")
    return digest.hexdigest()[:12]


def check_zero_shot(scale: Scale) -> None:
    """Check that a scale has the files and the encoder that zero-shot tasks need."""
    where = f"of scale {scale.name}"
    for task in TASKS:
        if not (Path(scale.requests) / f"{task}.jsonl").is_file():
            raise UsageError(f"requests {scale.requests!r} {where}: has no {task}.jsonl; {SEE}")
    words = shlex.split(scale.encoder)
    if "--bpe" not in words[:-1]:
        raise UsageError(f"encoder {scale.encoder!r} {where}: has no --bpe")
    i = words.index("--bpe")
    try:
        build_encoder(words[i + 1], [*words[:i], *words[i + 2 :]])
    except UsageError as error:
        raise UsageError(f"encoder {where}: {error}") from error
