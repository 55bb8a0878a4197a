"""Training in half precision on CPUs: ``--bf16`` as for users, ``--fp16`` as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_sffn.patches import trainer
from tests import commands

MODELS = (*commands.MODELS, "sffn")
HALF = {
    "bf16": ("--bf16",),
    "memory_efficient_bf16": ("--memory-efficient-bf16",),
    "fp16": ("--fp16", "--fp16-no-flatten-grads"),
    "memory_efficient_fp16": ("--memory-efficient-fp16",),
}
BIAS = "balancer.bias"
FLAGS = ("--max-update", "12", "--dropout", "0", "--clip-norm", "1.0", "--lr", "3e-3")


def losses(log: str) -> list[float]:
    return [float(record["loss"]) for record in commands.records(log) if "loss" in record]


@pytest.fixture
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fairseq's optimizer run on a CPU. It can, unless it flattens gradients."""
    monkeypatch.setattr(trainer, "check_precision", lambda common, flags: None)


@pytest.fixture(scope="module")
def in_fp32(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Return model -> losses of a training in full precision."""
    folder = tmp_path_factory.mktemp("fp32")
    return {
        model: losses(commands.train(data_bin, folder / model, model, *FLAGS)) for model in MODELS
    }


@pytest.mark.parametrize(
    ("model", "optimizer", "half"),
    [
        *(("avgk", "adam", half) for half in HALF),
        *(("avgk", "sffn_adam", half) for half in HALF),
        # A model does not know which of two ways keeps the copy in full precision.
        *((model, "sffn_adam", "bf16") for model in MODELS if model != "avgk"),
        *((model, "sffn_adam", "memory_efficient_fp16") for model in MODELS if model != "avgk"),
    ],
)
def test_trains_as_full_precision_does(
    model: str,
    half: str,
    optimizer: str,
    in_fp32: dict[str, list[float]],
    data_bin: Path,
    tmp_path: Path,
    fp16_on_cpu: None,
) -> None:
    flags = (*FLAGS, *HALF[half], "--optimizer", optimizer)
    got = losses(commands.train(data_bin, tmp_path, model, *flags))
    assert len(got) == len(in_fp32[model]) == 12
    # Rounding may change the choice between blocks that are almost equally good.
    assert got == pytest.approx(in_fp32[model], rel=0.03)
    assert got[-1] < got[0] - 0.5
    # The log is in fp32, of which half precision has the upper bits. Biases that balance the loads
    # stay in fp32, as half precision cannot add 0.001 to 1.
    dtype = torch.bfloat16 if "bf16" in half else torch.float16
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    for name, tensor in state.items():
        assert torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) != name.endswith(BIAS), name


@pytest.mark.parametrize("half", HALF)
def test_resumes(half: str, data_bin: Path, tmp_path: Path, fp16_on_cpu: None) -> None:
    flags = (*FLAGS, *HALF[half], "--optimizer", "sffn_adam")
    whole = losses(commands.train(data_bin, tmp_path / "whole", "avgk", *flags))
    first = losses(
        commands.train(data_bin, tmp_path / "parts", "avgk", *flags, "--max-update", "7")
    )
    rest = losses(commands.train(data_bin, tmp_path / "parts", "avgk", *flags))
    # fairseq does not save its fp32 copies of the parameters, so the resumed ones are rounded.
    assert first + rest == pytest.approx(whole, rel=2e-3)
    if half.startswith("memory_efficient"):
        assert first + rest == whole


@pytest.mark.parametrize("flag", ["--bf16", "--memory-efficient-bf16"])
@pytest.mark.parametrize("tpu", [True, False])
def test_bf16_is_for_gpus(
    flag: str, tpu: bool, data_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairseq would look for a TPU. The flag is allowed if the package for TPUs is installed."""
    monkeypatch.setattr(utils, "xm", "torch_xla" if tpu else None)
    words = [str(data_bin), "--user-dir", commands.USER_DIR, "--task", "language_modeling"]
    words += ["--arch", "transformer_lm_avgk_tiny", flag]
    parser = options.get_training_parser()
    parsed: Any = options.parse_args_and_arch(parser, input_args=words)
    common = convert_namespace_to_omegaconf(parsed).common
    assert (common.tpu, common.bf16) == (tpu, True)
