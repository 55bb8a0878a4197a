"""Links, flags, scripts, names and Python examples of all documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY

from fairseq_sffn.tools import flags

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "examples", "fairseq_sffn", "tests")
PATHS = [ROOT / "README.md", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in PATHS)
OTHER_PROGRAMS = {
    *("--index-url", "--no-deps", "--editable"),  # pip
    *("--shutdown-timeout", "--signals-to-handle", "--max-restarts"),  # torchrun
    *("--nodes", "--nnodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal"),
    *("--batch", "--name", "--open-mode", "--requeue", "--time"),  # Slurm
    *("--config-dir", "--config-name"),  # hydra
    # fairseq's moe branch, whose other flags begin with --moe-
    *("--alternate-decoder-ffn-embed-dim", "--dummy-a2a", "--record-a2a-perf-stats"),
    *("--use-tutel-moe", "--use-moe-pad-mask", "--cmr-gate-drop"),
    "--cosine-k-temperature",  # the example of a selection method of one's own
}
"""Flags of other programs."""
FORBIDDEN = (
    # Names that the project does not use any more.
    r"\bshared[ -]out\b",
    r"\bsharing out\b",
    r"\brepairs?\b",
    r"\bstudy\b|\bstudies\b",
    r"\bcompat\.py\b",
    r"(?<![\w/])parallel/",
    r"fairseq-sffn (run|report)\b",
    r"\bnative_bags\b|(?<!embedding )\bbags of\b",
    # Sentences that nobody could read, and figures that nobody can take again.
    r"earlier version",
    r"what differences in parameters",
    r"Two habits of fairseq",
    r"the same by log-likelihood",
    r"say where they belong",
    r"Its bytes are those",
    r"are then warned of",
    r"What is done is skipped",
    r"raises or lowers all rows alike",
    r"of what they could, without being told",
    r"Of that compute is a part",
    r"too close to be told",
    r"comes near, then no nearer",
    r"no seeds tell",
    r"rows that are the same as ours",
)


def text_of(document: str) -> str:
    """Return a document's text."""
    return (ROOT / document).read_text(encoding="utf-8")


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (unique := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(unique)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document} links to {target}"
        if anchor:
            assert anchor in anchors(file.resolve()), f"{document} links to {target}"


@cache
def known_flags() -> set[str]:
    """Return the flags of fairseq, of its registered parts, of our commands and of our scripts."""
    found = set(re.findall(r"`(--[\w-]+)`", flags.page()))
    configs = [FairseqConfig, *MODEL_DATACLASS_REGISTRY.values(), *TASK_DATACLASS_REGISTRY.values()]
    for registry in REGISTRIES.values():
        configs += registry["dataclass_registry"].values()
    for config in configs:
        found |= set(config_flags(config))
    for folder, pattern in (("examples", "*.py"), ("examples", "*.sh"), ("tests", "*.sh")):
        for script in (ROOT / folder).rglob(pattern):
            found |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", script.read_text()))
    assert ARCH_MODEL_REGISTRY and "--sffn-freq" in found and "--update-freq" in found
    return found | OTHER_PROGRAMS


def config_flags(config: Any) -> Iterator[str]:
    """Yield the flags of a configuration and of those inside it."""
    if not is_dataclass(config):
        return
    for option in fields(config):
        if is_dataclass(option.type):
            yield from config_flags(option.type)
        name = "--" + option.name.replace("_", "-")
        yield from (name, f"--no-{name[2:]}", option.metadata.get("argparse_alias", name))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document: str) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", text_of(document))
    # Words in capitals or dots after a flag are placeholders, as in --moe-....
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w.*-])", text))
    unknown = {flag for flag in mentioned - known_flags() if not flag.startswith("--moe-")}
    assert not unknown, f"{document}: {sorted(unknown)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_scripts_exist(document: str) -> None:
    """A command starts an existing file, relative to the project's root."""
    called = re.findall(
        r"\b(?:bash|python(?: -W ignore)?) ([\w./-]+\.(?:sh|py))", text_of(document)
    )
    called += re.findall(
        r"`((?:tests|examples|fairseq_sffn|\.github)/[\w./-]+)`", text_of(document)
    )
    called += re.findall(r"pytest ((?:tests/[\w./]+ ?)+)", text_of(document))
    for paths in called:
        for path in paths.split():
            assert (ROOT / path.rstrip(".")).exists(), f"{document}: {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_and_phrases(document: str) -> None:
    text = " ".join(text_of(document).split())
    found = [pattern for pattern in FORBIDDEN if re.search(pattern, text)]
    assert not found, f"{document}: {found}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_run(document: str) -> None:
    """Blocks that begin with an import of torch are complete programs."""
    for block in re.findall(r"```python\n(.*?)```", text_of(document), flags=re.DOTALL):
        if block.startswith("import torch"):
            exec(compile(block, document, "exec"), {"__name__": "example"})
        else:
            compile(block.strip().rstrip(","), document, "exec")


def test_the_page_of_flags_is_what_the_command_prints() -> None:
    """``fairseq-sffn flags > fairseq_sffn/FLAGS.md`` updates it."""
    assert text_of("fairseq_sffn/FLAGS.md") == flags.page() + "\n"


def test_every_folder_of_examples_has_a_document() -> None:
    documented = {path.parent.name for path in (ROOT / "examples").glob("*/README.md")}
    folders = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir()}
    assert folders - documented <= {"config", "__pycache__"}
