"""Measurements on a GPU, with fake events."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch


class FakeEvent:
    """A CUDA event of a device that runs in step with the host."""

    log: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2500.0


def test_a_gpu_is_timed_by_events(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time excludes preparation and earlier work, and does not come from the host's clock."""
    log: list[str] = []
    monkeypatch.setattr(FakeEvent, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    work = timing.Work(lambda: log.append("run"), prepare=lambda: log.append("prepare"))
    once = ["prepare", "idle", "record", "run", "record", "synchronize"]
    assert timing.seconds(work, device="cuda") == 2.5
    assert log == once
    log.clear()
    compared = timing.compare(work, {"a": work}, 2, device="cuda")
    assert log == once * 2 * (2 + timing.WARM_UP["cuda"])
    assert compared["a"]["seconds"]["median"] == 2.5 and compared["a"]["ratio"]["median"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["layer", "train_step", "decode", "peers"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    name: str, scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    output = tmp_path / "part.json"
    with pytest.raises(SystemExit, match=r"^--device cuda: PyTorch finds no GPU here$"):
        scripts[name].main(["--output", str(output), "--device", "cuda", "--dtype", "bf16"])
    assert not output.exists()


def test_training_in_fp16_needs_a_gpu(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--dtype fp16: fairseq-train needs --device cuda for it"):
        scripts["train_step"].main(["--output", str(tmp_path / "x"), "--dtype", "fp16"])


@pytest.mark.parametrize("size", ["tiny", "gpt3_medium"])
def test_train_step_on_a_gpu_asks_for_one_process_and_its_precision(
    size: str, scripts: dict[str, ModuleType], timing: ModuleType
) -> None:
    place = timing.Place("cuda", "bf16")
    asked = scripts["train_step"].flags("avgk", "adam", 8, 2, size=size, place=place)
    assert "--cpu" not in asked and "--bf16" in asked and f"transformer_lm_avgk_{size}" in asked
    assert asked[asked.index("--distributed-world-size") + 1] == "1"
