"""The metric of the best checkpoint is looked for before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging import metrics

from fairseq_sffn.errors import UsageError
from fairseq_sffn.patches import training
from fairseq_sffn.patches.training import check_metric
from tests import commands

ONE = ("--max-update", "1")


@pytest.mark.parametrize("criterion", ["sffn_cross_entropy", "cross_entropy"])
def test_a_metric_that_there_is_not(criterion: str, data_bin: Path, tmp_path: Path) -> None:
    """Training stops before the first update, and lists the metrics."""
    flags = ("--best-checkpoint-metric", "nosuch", "--criterion", criterion, "--max-update", "9")
    with pytest.raises(UsageError) as stopped:
        commands.train(data_bin, tmp_path, "avgk", *flags)
    line = str(stopped.value)
    assert line.startswith("--best-checkpoint-metric nosuch: is none of those that validation ")
    assert " loss, " in line and " ppl" in line and "\n" not in line
    assert (" load_max, " in line) == (criterion == "sffn_cross_entropy")
    assert not list(tmp_path.iterdir())


def test_a_metric_that_is_never_asked_for(data_bin: Path, tmp_path: Path) -> None:
    flags = ("--best-checkpoint-metric", "nosuch", "--disable-validation")
    assert commands.losses(commands.train(data_bin, tmp_path, "avgk", *ONE, *flags))


@pytest.mark.parametrize("model", ["avgk", "gshard"])
def test_training_goes_on_as_without_the_look(model: str, data_bin: Path, tmp_path: Path) -> None:
    """Losses and checkpoints are those of the default metric."""
    logs = {
        metric: commands.train(
            *(data_bin, tmp_path / metric, model, "--best-checkpoint-metric", metric),
            *("--max-update", "4", "--validate-interval-updates", "2", "--dropout", "0.1"),
        )
        for metric in ("loss", "ppl")
    }
    losses = [commands.losses(log) for log in logs.values()]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    validations = [
        [
            {k: v for k, v in record.items() if "best" not in k and not k.endswith("wps")}
            for record in commands.records(log, "valid")
        ]
        for log in logs.values()
    ]
    assert validations[0] == validations[1] and len(validations[0]) == 2
    states = [torch.load(tmp_path / metric / "checkpoint_last.pt") for metric in logs]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    best = torch.load(tmp_path / "ppl" / "checkpoint_best.pt")["extra_state"]["best"]
    assert best == pytest.approx(float(validations[1][-1]["valid_ppl"]))


def test_the_look_leaves_nothing_behind(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the meters of training nor the dummy batch of ranks without sentences change."""
    looks = []

    def look(cfg: Any, trainer: Any, *args: Any) -> None:
        trainer.reset_dummy_batch(batch := {"of": "the test"})
        before = set(metrics.get_meters("default") or ())
        check_metric(cfg, trainer, *args)
        after = set(metrics.get_meters("default") or ())
        looks.append((before == after, trainer._dummy_batch is batch))

    monkeypatch.setattr(training, "check_metric", look)
    flags = ("--best-checkpoint-metric", "ppl", "--batch-size", "100", "--max-update", "9")
    log = commands.train(data_bin, tmp_path, "avgk", *flags, "--required-batch-size-multiple", "1")
    assert looks == [(True, True)]  # once for all epochs
    assert {int(record["epoch"]) for record in commands.records(log)} >= {1, 2}
