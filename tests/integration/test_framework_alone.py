"""The framework without fairseq, and the ways in which the plugin is loaded, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, USER_DIR
from tests.models.small_lm import small_lm

BLOCKED = ("fairseq", "fairseq_cli", "fairscale", "hydra", "omegaconf", "transformers")
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
"""
MEMORY = """
from fairseq_sffn.memory import MemoryConfig, SparseMemory, convert, drop_in
"""
LIMIT_SECONDS = 3.0


def python(script: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Run a script in a new process, and return its output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_framework_needs_no_fairseq() -> None:
    train = """
import torch
for selector in ("avgk", "vanilla_m", "lorkm", "pkm", "rand_hash", "switch", "gshard", "hash_moe"):
    vocab = 11 if "hash" in selector else None
    config = MemoryConfig(embed_dim=8, num_cells=64, block_size=1 if "m" in selector else 8,
                          active_blocks=4, selector=selector, vocab_size=vocab,
                          token_counts=[1] * 11)
    memory = SparseMemory(config)
    x = torch.randn(3, 5, 8)
    memory(x, torch.randint(11, (3, 5))).output.sum().backward()
print("trained")
"""
    assert python(BLOCK + MEMORY + train) == "trained\n"


def test_the_framework_is_imported_fast() -> None:
    """Processor time beyond PyTorch's import, which other processes do not change."""
    clock = "time.process_time()"
    script = f"import time, torch; begin = {clock}{MEMORY}print({clock} - begin)"
    assert float(python(BLOCK + script)) < LIMIT_SECONDS


def test_the_framework_leaves_fairseq_alone() -> None:
    script = f"""
import sys
assert not {set(BLOCKED)} & {{name.partition(".")[0] for name in sys.modules}}
import numpy
import fairseq.tasks, fairseq_cli.train
from fairseq.models import MODEL_REGISTRY
assert not hasattr(numpy, "compat")
assert "transformer_lm_avgk" not in MODEL_REGISTRY and "fairseq_sffn.patches" not in sys.modules
functions = [fairseq_cli.train.main, fairseq_cli.train.add_defaults, fairseq.models.build_model]
assert not any(hasattr(function, "__wrapped__") for function in functions)
"""
    python(MEMORY + script)


LOADED = """
from fairseq import options, tasks
from fairseq.models import MODEL_REGISTRY
from fairseq_sffn.patches import PATCHES
assert "transformer_lm_avgk" in MODEL_REGISTRY and "sffn_language_modeling" in tasks.TASK_REGISTRY
assert all(each.is_applied() for each in PATCHES)
arguments = ["data", "--user-dir", USER_DIR, "--arch", "transformer_lm_avgk"]
arguments += ["--task", "language_modeling", "--optimizer", "sffn_adam", "--trust-checkpoint"]
arguments += ["--criterion", "sffn_cross_entropy", "--sffn-block-size", "8"]
args = options.parse_args_and_arch(options.get_training_parser(), arguments)
assert args.sffn_block_size == 8
print("loaded")
""".replace("USER_DIR", repr(USER_DIR))
WAYS = {
    "user dir": "import argparse; from fairseq.utils import import_user_module; "
    f"import_user_module(argparse.Namespace(user_dir={USER_DIR!r}))",
    "import after fairseq": "import fairseq; import fairseq_sffn",
    "the framework after fairseq": "import fairseq.models; import fairseq_sffn.memory",
    "the framework first": "import fairseq_sffn.memory; import fairseq_sffn.plugin",
    "tools": "import fairseq_sffn.tools.cost",
}


@pytest.mark.parametrize("way", WAYS)
def test_the_plugin_is_loaded(way: str) -> None:
    assert python(WAYS[way] + LOADED) == "loaded\n"


@pytest.mark.parametrize("command", ["train", "eval_lm"])
def test_a_command_as_a_module(command: str, tmp_path: Path) -> None:
    """The copy of the command's functions in the main module is patched too."""
    done = subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{command}", "nowhere", "--user-dir", USER_DIR, "--cpu"]
        + ["--batch-size", "-1", "--path" if command == "eval_lm" else "--save-dir", "nothing"]
        + (
            ["--task", "language_modeling", "--arch", "transformer_lm_avgk"]
            if command == "train"
            else []
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stderr.splitlines()[-1] == "--batch-size -1: must be at least 1"


def test_a_model_is_unpickled_where_nothing_was_imported(tmp_path: Path) -> None:
    model = small_lm("avgk").eval()
    tokens = torch.arange(4, 10)[None]
    path = tmp_path / "model.pt"
    torch.save((model, tokens, model(tokens)[0]), path)
    script = """
import sys, torch
model, tokens, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(tokens)[0], expected)
from fairseq.models import MODEL_REGISTRY
assert "transformer_lm_avgk" in MODEL_REGISTRY
"""
    python(script, str(path))
    spawn = f"""
import sys, torch
def work(rank, model, tokens):
    assert model(tokens)[0].shape[-1] and "fairseq_sffn.models" in sys.modules
if __name__ == "__main__":
    model, tokens, _ = torch.load({str(path)!r}, weights_only=False)
    torch.multiprocessing.spawn(work, args=(model, tokens))
"""
    (tmp_path / "spawn.py").write_text(spawn)
    done = subprocess.run([sys.executable, tmp_path / "spawn.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
