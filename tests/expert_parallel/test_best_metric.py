"""Several processes look for the metric of the best checkpoint together."""

import json
from pathlib import Path

from tests import commands
from tests.expert_parallel import launch

FLAGS = (
    *launch.SAME_SENTENCES,
    *("--batch-size", "8", "--max-update", "3", "--sffn-expert-parallel", "2"),
)


def test_a_metric_that_there_is_not(data_bin: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--best-checkpoint-metric", "nosuch")
    jobs = tmp_path / "jobs.json"
    jobs.write_text(
        json.dumps({"job": launch.training(data_bin, tmp_path / "run", "avgk", *flags)})
    )
    done = launch.run(2, launch.HERE / "worker.py", jobs)
    assert done.returncode != 0
    line = "--best-checkpoint-metric nosuch: is none of those that validation gives: balance_loss, "
    assert line in done.stderr and "train_inner" not in done.stdout + done.stderr


def test_training_goes_on_as_without_the_look(data_bin: Path, tmp_path: Path) -> None:
    jobs = {
        metric: launch.training(
            *(data_bin, tmp_path / f"{metric}.run", "avgk", *FLAGS),
            *("--best-checkpoint-metric", metric, "--dropout", "0.1"),
        )
        for metric in ("loss", "ppl")
    }
    losses = [commands.losses(log) for log in launch.train(2, tmp_path, jobs).values()]
    assert losses[0] == losses[1] and len(losses[0]) == 3
