"""Half precision in two processes, each with half of the blocks, against one process."""

from pathlib import Path
from typing import Any

import pytest

from fairseq_sffn.patches import trainer
from tests import commands
from tests.expert_parallel import launch

HALF = {
    "bf16": ("--bf16",),
    "memory_efficient_bf16": ("--memory-efficient-bf16",),
    "fp16": ("--fp16", "--fp16-no-flatten-grads"),
    "memory_efficient_fp16": ("--memory-efficient-fp16",),
}
MODELS = ("avgk", "switch", "pkm_ffn")
FLAGS = (*launch.SAME_SENTENCES, "--max-update", "12", "--clip-norm", "1.0", "--lr", "3e-3")
TOGETHER = ("--batch-size", "4", "--sffn-expert-parallel", "2")


def allow_on_cpus() -> None:
    """Allow fp16. fairseq's optimizer for it runs on a CPU, unless it flattens gradients."""
    trainer.check_precision = lambda common, flags: None


@pytest.fixture(scope="module")
def logs(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return name of a training -> logs of one process and of two."""
    folder = tmp_path_factory.mktemp("precision")
    result, jobs = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "check_precision", trainer.check_precision)  # is restored
        allow_on_cpus()
        for half, of_half in HALF.items():
            for model in MODELS:
                name, flags = f"{model}-{half}", (*FLAGS, *of_half)
                result[name] = commands.train(data_bin, folder / name, model, *flags)
                save_dir = folder / f"{name}-2"
                jobs[f"{name}-2"] = launch.training(data_bin, save_dir, model, *flags, *TOGETHER)
        result |= launch.train(2, folder / "jobs", jobs, f"{__name__}:allow_on_cpus")
    return {name: commands.records(log) for name, log in result.items()}


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_as_one(model: str, half: str, logs: dict[str, Any]) -> None:
    alone, together = (
        {
            name: [float(record[name]) for record in logs[run] if name in record]
            for name in ("loss", "gnorm", "valid_loss")
        }
        for run in (f"{model}-{half}", f"{model}-{half}-2")
    )
    assert len(alone["loss"]) == len(together["loss"]) == 12
    assert together["loss"] == pytest.approx(alone["loss"], rel=0.02)
    assert together["gnorm"] == pytest.approx(alone["gnorm"], rel=0.1)
    assert together["valid_loss"] == pytest.approx(alone["valid_loss"], rel=0.02)
