"""The examples and tables of README.md and of the framework's README do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_sffn.models.transformer_lm import METHODS
from fairseq_sffn.tools.cost import cost_figures
from fairseq_sffn.tools.language_model import build_language_model
from tests import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FRAMEWORK = (ROOT / "fairseq_sffn" / "memory" / "README.md").read_text()
TOOLS = (ROOT / "fairseq_sffn" / "tools" / "README.md").read_text()
COSTS = re.compile(
    r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+%) \|$", re.M
)
"""A row of the table of costs."""


def python_blocks(document: str, containing: str) -> list[str]:
    """Return the Python blocks of a document that contain a text."""
    blocks = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    return [block for block in blocks if containing in block]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 220


def test_added_selection_method_trains(tmp_path: Path, data_bin: Path) -> None:
    (selector,) = python_blocks(FRAMEWORK, "class CosineK(")
    (row,) = re.findall(r'^ +Method\("cosine_k".*\n', FRAMEWORK, re.M)
    package = shutil.copytree(ROOT / "fairseq_sffn", tmp_path / "fairseq_sffn")
    (package / "memory" / "selectors" / "cosine_k.py").write_text(selector)
    table = package / "models" / "transformer_lm.py"
    marker = "METHODS = (\n"
    assert marker in table.read_text()
    table.write_text(table.read_text().replace(marker, marker + row))

    result = subprocess.run(
        [
            *(Path(sys.executable).parent / "fairseq-train", data_bin, "--user-dir", package),
            *("--arch", "transformer_lm_cosine_k_tiny", "--task", "language_modeling"),
            *(*commands.SMALL, "--sffn-block-size", "8", "--cosine-k-temperature", "0.5"),
            *("--sffn-gate", "softmax", "--sffn-capacity-factor", "1.0"),
            *("--criterion", "sffn_cross_entropy", "--balance-loss-weight", "0.01"),
            *("--optimizer", "adam", "--lr", "1e-2", "--tokens-per-sample", "16"),
            *("--batch-size", "8", "--max-update", "4", "--cpu", "--num-workers", "0"),
            *("--save-dir", tmp_path / "checkpoints", "--log-format", "json"),
            *("--log-interval", "1"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    records = commands.records(result.stderr + result.stdout)
    assert [int(record["num_updates"]) for record in records] == [1, 2, 3, 4]
    assert {"balance_loss", "load_max", "dropped_share"} <= records[-1].keys()


def test_memory_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = python_blocks(README, "SparseMemory(")
    exec(example, {})
    assert "torch.Size([8, 128, 256]) torch.Size([1024, 16])" in capsys.readouterr().out


def cost_row(method: str) -> tuple[str, ...]:
    """Return a row of the table of costs, as ``fairseq-sffn cost`` has it."""
    model = build_language_model(f"transformer_lm_{method}_gpt3_medium", 51200, 2048, [])
    cost = cost_figures(model, context=2048, tokens=60e9)
    return (
        method,
        f"{cost['params']:,}",
        f"{cost['active_params']:,}",
        f"{cost['flops_per_token'] / 1e9:.3f}",
        f"{cost['train_zettaflops']:.4f}",
        f"{cost['overhead_vs_dense']:+.2%}",
    )


def test_the_costs_are_what_the_command_gives() -> None:
    methods = ["dense", *(method.name for method in METHODS if method.selector)]
    assert COSTS.findall(TOOLS) == [cost_row(method) for method in methods]


def test_readme_lists_every_model() -> None:
    rows = re.findall(r"^\| `transformer_lm_(\w+)` \|", README, re.M)
    assert sorted(rows) == sorted(["dense", *(method.name for method in METHODS)])
