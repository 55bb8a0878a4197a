"""The examples of models that are not fairseq's learn, save and load."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fairseq_sffn.memory.drop_in import memories
from tests.integration.test_framework_alone import BLOCK

EXAMPLES = Path(__file__).parents[3] / "examples" / "drop_in"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    return example("plain")


@pytest.mark.parametrize(
    "options",
    [
        ["--selector", "moe", "--balance-rate", "0.01", "--recompute"],
        ["--selector", "hash_layer"],
        ["--selector", "avgk", "--balance-weight", "0.1", "--bf16"],
    ],
)
def test_the_plain_model_learns_and_loads(
    plain: ModuleType, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    losses = plain.main([*options, "--updates", "6", "--save", str(path)])
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert f"{path}: loaded, with equal outputs" in capsys.readouterr().out
    biases = [each for name, each in torch.load(path)["weights"].items() if name.endswith(".bias")]
    moved = any(each.shape == (64,) and (each.abs() > 0).all() for each in biases)
    assert moved or "--balance-rate" not in options


def test_padding_changes_nothing_in_the_plain_model(plain: ModuleType) -> None:
    config = plain.MemoryConfig(16, 64, 8, 2, selector="switch")
    model = plain.LanguageModel(config).double()
    ids = torch.randint(256, (3, 9))
    padded = torch.cat([ids, torch.full((3, 4), 256)], dim=1)
    wanted, balance = model(ids)
    logits, padded_balance = model(padded)
    torch.testing.assert_close(logits[:, :9], wanted)
    torch.testing.assert_close(padded_balance, balance)
    assert balance > 1.5  # of two layers
    loads = [int(memory.balancer.loads.sum()) for memory in memories(model)]
    assert loads == [2 * 2 * 27] * 2  # of both calls, without padding


def test_the_plain_model_needs_no_fairseq(tmp_path: Path) -> None:
    path = EXAMPLES / "plain.py"
    script = f"{BLOCK}\nimport runpy; sys.argv = sys.argv[1:]"
    script += "\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", script, path, "--updates", "1", "--save", tmp_path / "m"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded, with equal outputs" in done.stdout


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        ["--selector", "switch", "--recompute"],
        ["--selector", "hash_moe", "--bf16"],
        ["--selector", "avgk", "--balance-rate", "0.01"],
    ],
)
def test_transformers_models_learn_and_load(
    model: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    models = example("transformers_models")
    folder = tmp_path / "model"
    arguments = ["--model", model, *options, "--updates", "6", "--save", str(folder)]
    losses = models.main(arguments)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert f"{folder}: loaded, with equal outputs" in capsys.readouterr().out
    assert (folder / "model.safetensors").exists() and (folder / "config.json").exists()
    kind = models.SparseGPT2 if model == "gpt2" else models.SparseLlama
    loaded = kind.from_pretrained(folder)
    assert isinstance(loaded, transformers.PreTrainedModel)
    # Counters that no file has begin at 0.
    for memory in memories(loaded):
        balancer = memory.balancer
        assert not any(each.any() for each in (balancer.loads, balancer.moments))
        assert not balancer.loss_counts.any()
        assert balancer.bias is None or balancer.bias.any()
    half = kind.from_pretrained(folder, dtype=torch.bfloat16)
    for memory, own in zip(memories(half), memories(loaded), strict=True):
        assert memory.values.dtype == torch.bfloat16
        bias, own_bias = memory.balancer.bias, own.balancer.bias
        assert bias is own_bias is None or torch.equal(bias, own_bias)


def test_a_mixtral_whose_blocks_are_memories_computes_the_same() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from fairseq_sffn.memory.convert import from_mixtral
    from fairseq_sffn.memory.drop_in import MemoryFFN

    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        wanted = model(ids).logits
        for layer in model.model.layers:
            layer.mlp = MemoryFFN(from_mixtral(layer.mlp, config), balance_weight=0.02)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-5)
    assert len(list(memories(model))) == 2
