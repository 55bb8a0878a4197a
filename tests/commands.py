"""Runs fairseq's commands inside the test process, on a small corpus."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.dataclass.initialize import hydra_init
from fairseq.logging import metrics, progress_bar
from fairseq_cli import hydra_train as hydra_command
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fairseq_sffn.models.transformer_lm import METHODS
from fairseq_sffn.tools import cli
from tests.models.small_lm import PLAN

ROOT = Path(__file__).parents[1]
USER_DIR = str(ROOT / "fairseq_sffn")
EXAMPLES = ROOT / "examples"
MODELS = ("dense", *(method.name for method in METHODS if method.selector))
SMALL = (
    *("--decoder-layers", "2", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "32"),
    *("--decoder-attention-heads", "2"),
)
"""Flags that make a ``_tiny`` model smaller still."""
OF_MODEL = {
    "avgk": ("--sffn-block-size", "8"),
    "rand_hash": ("--sffn-block-size", "8"),
    "moe": ("--sffn-block-size", "8"),
    "sigma_moe": ("--sffn-block-size", "8"),
    "hash_moe": ("--sffn-block-size", "8"),
    "pkm": ("--sffn-active-blocks", "16"),
    "sffn": ("--sffn-selector", "avgk", "--sffn-block-size", "8", "--sffn-gate", "sigmoid"),
    "mixed": ("--decoder-layers", "3", "--sffn-layers", PLAN, "--hash-table", "bigram"),
}
"""Further flags that a model needs."""
ARCHS = {"mixed": "sffn"}
"""Name of a model in the tests -> name of its architecture, if it differs."""


def arch(model: str) -> str:
    """Return the architecture of a small model."""
    return f"transformer_lm_{ARCHS.get(model, model)}_tiny"


def small_flags(model: str) -> tuple[str, ...]:
    """Return ``SMALL`` with a block size that fits the model."""
    return (*SMALL, *OF_MODEL.get(model, ()))


def write_corpus(folder: Path) -> None:
    """Write train, valid and test text of a small grammar, which a model can learn."""
    rng = random.Random(0)
    words = {kind: [f"{kind}{i}" for i in range(count)] for kind, count in (("n", 30), ("v", 20))}
    for split, lines in (("train", 400), ("valid", 40), ("test", 40)):
        sentences = []
        for _ in range(lines):
            subject, verb = rng.choice(words["n"]), rng.choice(words["v"])
            sentences.append(f"the {subject} {verb} the {rng.choice(words['n'])} of {subject} .")
        (folder / split).write_text("\n".join(sentences) + "\n")


def run(command: str, *arguments: str, stdin: str = "") -> str:
    """Run ``fairseq-{command}`` as its script would, and return its output and log.

    Raises:
        SystemExit: as the command does.
    """
    from importlib import import_module

    module = import_module("fairseq_cli." + command.replace("-", "_"))
    old_argv, old_stdin = sys.argv, sys.stdin
    sys.argv = [f"fairseq-{command}", *map(str, arguments)]
    sys.stdin = io.StringIO(stdin)
    try:
        return capture(module.cli_main)
    finally:
        sys.argv, sys.stdin = old_argv, old_stdin


def capture(command: Callable[[], Any]) -> str:
    """Run a command as in a new process, and return its output and log."""
    output = io.StringIO()
    with _fresh_process_state(), _captured(output):
        command()
    return output.getvalue()


def refusal(command: Callable[[], Any]) -> str:
    """Return the one line that a command stops with. Its exit status must not be 0."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            command()
    except SystemExit as stopped:
        if stopped.code == 2:  # argparse prints the usage, then the message
            return stderr.getvalue().strip().splitlines()[-1]
        assert isinstance(stopped.code, str) and "\n" not in stopped.code, repr(stopped.code)
        return stopped.code
    raise AssertionError("the command was not refused")


def preprocess(folder: Path) -> Path:
    """Binarise the corpus in ``folder``, and return the folder of the data."""
    write_corpus(folder)
    run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", folder / "bin"),
        *("--trainpref", folder / "train", "--validpref", folder / "valid"),
        *("--testpref", folder / "test"),
    )
    return folder / "bin"


def train(data: Path, save_dir: Path, model: str, *flags: str) -> str:
    """Train a small model for 6 updates, unless flags say otherwise. Later flags win."""
    return run(
        *("train", data, "--user-dir", USER_DIR, "--task", "language_modeling"),
        *("--arch", arch(model), *small_flags(model)),
        *("--criterion", "sffn_cross_entropy", "--optimizer", "adam", "--lr", "1e-2"),
        *("--tokens-per-sample", "16", "--batch-size", "8", "--max-update", "6", "--cpu"),
        *("--save-dir", save_dir, "--num-workers", "0", "--log-format", "json"),
        *("--log-interval", "1", "--no-progress-bar", *flags),
    )


def hydra_config(*overrides: str) -> Any:
    """Return the configuration that fairseq-hydra-train composes from the example."""
    hydra_init("avgk_tiny")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(EXAMPLES / "config"), version_base="1.1"):
        return compose("avgk_tiny", overrides=list(overrides))


def override(name: str, path: Path | str) -> str:
    """Return the override that sets an option to a path, whatever characters the path has."""
    escaped = str(path).replace("'", "\\'")
    return f"{name}='{escaped}'"


def hydra_train(data: Path, save_dir: Path, *overrides: str) -> str:
    """Train the example with fairseq-hydra-train."""
    where = {"task.data": data, "checkpoint.save_dir": save_dir, "common.user_dir": USER_DIR}
    config = hydra_config(*(override(*each) for each in where.items()), *overrides)
    return capture(lambda: hydra_command._hydra_main(config))


def apply(command: str, data: Path, checkpoint: Path, *flags: str, stdin: str = "") -> str:
    """Run a command on a trained model, without worker processes. They would hang for seconds,
    because they are forked from a process with threads."""
    return run(
        *(command, data, "--user-dir", USER_DIR, "--cpu", "--num-workers", "0"),
        *("--path", checkpoint, *flags),
        stdin=stdin,
    )


def evaluate(data: Path, checkpoint: Path, *flags: str) -> float:
    """Return the perplexity of a trained model on the validation split."""
    flags = ("--gen-subset", "valid", "--tokens-per-sample", "16", *flags)
    return perplexity(apply("eval-lm", data, checkpoint, *flags))


def sffn(*words: Any) -> str:
    """Run ``fairseq-sffn`` and return its output.

    Raises:
        SystemExit: as the command does.
    """
    return capture(lambda: cli.main([str(word) for word in words]))


def records(log: str, tag: str = "train_inner") -> list[dict[str, Any]]:
    """Parse the JSON records of a log, in the format of fairseq's commands or of hydra."""
    pattern = rf"[|\[] ?{tag}[ \]].*?(\{{.*\}})"
    return [json.loads(match) for match in re.findall(pattern, log)]


def losses(log: str) -> dict[int, str]:
    """Return update -> training loss, as logged."""
    return {int(record["num_updates"]): record["loss"] for record in records(log)}


def perplexity(log: str) -> float:
    """Return the perplexity that fairseq-eval-lm found."""
    match = re.search(r"Perplexity: ([\d.]+)", log)
    assert match, log[-2000:]
    return float(match[1])


@contextlib.contextmanager
def _fresh_process_state() -> Iterator[None]:
    """Clear the state that fairseq keeps in attributes of functions, as a new process has none."""
    for name in ("best",):
        if hasattr(checkpoint_utils.save_checkpoint, name):
            delattr(checkpoint_utils.save_checkpoint, name)
    metrics.reset()
    yield
    for writer in (progress_bar._tensorboard_writers or {}).values():
        writer.close()
    progress_bar._tensorboard_writers.clear()


@contextlib.contextmanager
def _captured(output: io.StringIO) -> Iterator[None]:
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("| %(levelname)s | %(name)s | %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def leave() -> NoReturn:
    """End this process and its peers at once. If it ended normally, a thread of gloo could abort
    it, with or without ``destroy_process_group``."""
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
