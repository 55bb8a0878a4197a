"""The setup of every test: one thread, a fixed seed, the project on the path."""

import copy
import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

HERE = Path(__file__).parent
LONGEST = (
    "integration/slurm/test_experiments.py",
    "integration/slurm/test_jobs.py",
    "expert_parallel/test_training.py",
    "examples/test_fake_cuda.py",
    "expert_parallel/test_faults.py",
    "integration/test_resume.py",
    "integration/test_translation.py",
    "expert_parallel/test_signals.py",
    "integration/hosts/test_lost_hosts.py",
    "integration/hosts/test_folders.py",
    "examples/test_gpu_kit.py",
    "integration/test_options.py",
    "integration/test_wrong_input.py",
    "memory/compute/test_triton_kernels.py",
    "examples/experiments/test_run_command.py",
    "integration/test_interruptions.py",
    "patches/test_training_state.py",
    "optim/test_half_precision.py",
    "models/test_transformer_lm.py",
    "tools/test_cli.py",
    "checkpoints/test_structure.py",
    "examples/test_paper_tables.py",
)
"""Files that take more than 25 seconds of CPU time. They come first, as several workers take files
one by one and would wait for a long file at the end."""

sys.path[:0] = [str(HERE.parent), str(HERE.parent / "examples")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(HERE / "stand_ins"), os.environ.get("PYTHONPATH")])
)
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
# For each command hydra copies the schemas of all models, then copies each copy, and parses 340
# options. Most options have the values of the command before.
ConfigStore.__deepcopy__ = lambda self, memo: self
parse, parser = OverridesParser.parse_rule, OverridesParser.create()
parsed = functools.lru_cache(50_000)(lambda text, rule: parse(parser, text, rule))
OverridesParser.parse_rule = lambda self, text, rule: copy.copy(parsed(text, rule))

# This must precede a test that imports the framework alone. Triton has its variable by now.
import fairseq_sffn.plugin  # noqa: E402, F401

FOLDERS = {
    "integration": "integration",
    "examples": "integration",
    "expert_parallel": "distributed",
}
"""Folder -> marker of its tests."""
STARTERS = {"data_bin", "quick_start"}
"""Fixtures of tests that run whole commands or start other programs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if marker := FOLDERS.get(folder):
            item.add_marker(marker)
        if STARTERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("integration")
    place = {HERE / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Exclude the collected tests from garbage collection, which took a quarter of the time to scan
    thousands of objects that stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def template() -> Iterator[Any]:
    """Start the template of ``templates.py``."""
    from tests import templates

    with templates.begin() as template:
        yield template


@pytest.fixture(scope="module")
def quick_start(template: Any) -> Iterator[None]:
    """Start the Python programs of a file's tests from the template."""
    with template.used():
        yield


@pytest.fixture(scope="session")
def data_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small binarised corpus."""
    from tests import commands

    return commands.preprocess(tmp_path_factory.mktemp("corpus"))
