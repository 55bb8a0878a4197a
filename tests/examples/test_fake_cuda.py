"""Layers and training steps over CUDA tensors without numbers. They show what fails on a GPU, or
waits for it."""

import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "examples" / "gpu"
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")

FAULTS = {
    "none": ("", ""),
    "a product a block": (
        "scores.top_blocks = lambda s, k: (F.grouped_mm(s, s.new_empty(9, s.shape[1], 64), "
        "offs=torch.zeros(9, dtype=torch.int32, device='cuda')), top(s, k))[1]",
        "grouped_mm, slow or refused",
    ),
    "sizes are read": (
        "engines.ENGINES['tiled'] = engines.ENGINES['loop']",
        "gives a tensor on the host at fairseq_sffn/memory/compute/chunks.py",
    ),
    "a number is read": (
        "scores.top_blocks = lambda s, k: (bool(s.sum() > 0), top(s, k))[1]",
        "a number is read at",
    ),
    "a number of results is read": (
        "scores.top_blocks = lambda s, k: (s.gt(0).nonzero(), top(s, k))[1]",
        "DynamicOutputShapeException",
    ),
    "two devices": (
        "scores.top_blocks = lambda s, k: top(s, k) + torch.tensor([0])",
        "on the same device",
    ),
    "a copy": (
        "scores.top_blocks = lambda s, k: top(s, k) + torch.tensor([0], device='cuda')",
        "copy to the device at",
    ),
    "many kernels": (
        "scores.top_blocks = lambda s, k: [top(s, k) for _ in range(300)][0]",
        "kernels, more than",
    ),
}
"""Name -> how a layer is broken, and the expected message."""

BROKEN = """
import json, sys
sys.path.insert(0, {folder!r})
import recorder
import fake_cuda, torch, torch.nn.functional as F
from fairseq_sffn.memory import scores
from fairseq_sffn.memory.compute import engines
top, tiled = scores.top_blocks, engines.ENGINES["tiled"]
case = fake_cuda.Case("paper", "avgk", 64, "bf16")
found = {{}}
for name, (fault, _) in json.loads({faults!r}).items():
    scores.top_blocks, engines.ENGINES["tiled"] = top, tiled
    exec(fault)
    found[name] = fake_cuda.run(case).problems
print(json.dumps(found))
recorder.leave(0)
"""


def run(*command, env=None):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Return the environment of a script that need not compile the guard and start again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GPU))
        recorder = importlib.import_module("recorder")
        return {**os.environ, **recorder.compile_guard(tmp_path_factory.mktemp("guard"))}


def test_nothing_fails_or_waits_over_all_selectors_and_types(tmp_path):
    """The script also runs a training step of each method and of the paper's model."""
    done = run(GPU / "fake_cuda.py", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "found.json").read_text())
    names = [outcome["name"] for outcome in outcomes]
    assert len(names) == len(set(names)) > 850
    for words in (
        *(f"toy {selector} " for selector in ("avgk", "base", "hash_layer", "lorkm", "pkm_ffn")),
        *(
            f" {kind}"
            for kind in ("fp32", "fp64", "bf16", "fp16", "autocast bf16", "autocast fp16")
        ),
        *("padding", "capacity", "evaluation", "without losses", "gate=softmax"),
        *("glu=silu shared=2", "avgk_tiny bf16 --sffn-glu silu --sffn-shared-blocks 1"),
        *(f"paper avgk g={block_size} bf16" for block_size in (4096, 64, 16, 1)),
        *(
            f"training step of avgk_gpt3_medium {kind} --sffn-block-size {block_size}"
            for kind, block_size in (
                *itertools.product(("bf16", "autocast fp16"), (64, 16)),
                *itertools.product(("fp16", "autocast bf16"), (64,)),
            )
        ),
    ):
        assert any(words in name for name in names), words
    assert all(outcome["launches"] for outcome in outcomes)
    # Known waits of fairseq: it looks for padding, and the loss scale needs the norm.
    known = re.compile(r"(number is read|copy to the device) at fairseq/(models|optim)/")
    for outcome in outcomes:
        assert all(known.search(where) for where in outcome["fairseq_waits"]), outcome


def test_faults_are_found(guarded, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(folder=str(GPU), faults=json.dumps(FAULTS)))
    done = run(script, env=guarded)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (_, line) in FAULTS.items():
        assert bool(found[name]) == bool(line), name
        assert any(line in problem for problem in found[name]) or not line, found[name]


def test_what_a_layer_moves_is_counted(guarded, tmp_path):
    """The bytes are near the floor of gathered rows. VanillaM is below it, as it gathers no
    rows."""
    done = run(GPU / "traffic.py", "--json", tmp_path / "rows.json", env=guarded)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0]["layer"] == "Avg-K, g = 4,096"
    assert done.stdout.count("\n| ") == len(rows) + 1
    for row in rows[:-1]:
        assert 1 <= row["bytes"] / row["floor"] < 3
    assert rows[-1]["bytes"] < rows[-1]["floor"] / 5
    # x, output, their gradients; tables and their gradients; hidden activations; four rows per
    # assignment.
    assert rows[2]["floor"] == 2 * (
        4 * 8192 * 1024 + 4 * 65536 * 1024 + 4 * 8192 * 4096 + 4 * 8192 * 64 * 1024
    )
