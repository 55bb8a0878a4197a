"""Zero-shot tasks of runs, before and after the training."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import training
from experiments.runner import Runner
from fairseq_sffn.errors import UsageError
from tests.examples.experiments.trial import AVGK, Trial, trained


def test_zero_shot_tasks_are_added_to_what_is_done(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    trial.run()
    before = trial.results()
    monkeypatch.setattr(Runner, "zero_shot", lambda self, checkpoint: {"tasks": []})
    monkeypatch.setattr(training, "versions", lambda: {"fairseq_sffn": "a later one"})
    monkeypatch.setattr(training, "machine", lambda device: "another one")
    trial.ask_for_zero_shot()
    trial.run()
    ((key, result),) = trial.results().items()
    assert result == before[key] | {"zero_shot": {"tasks": []}} and "test" in result["evaluation"]
    assert [call[1] for call in calls if call[0] == "fairseq_sffn"] == ["evaluate"]
    assert trained(calls) == 1


def test_what_was_found_is_kept_where_a_zero_shot_task_fails(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Runner, checkpoint: Path) -> None:
        raise UsageError("no such task")

    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    trial.ask_for_zero_shot()
    monkeypatch.setattr(Runner, "zero_shot", fail)
    with pytest.raises(SystemExit, match="no such task"):
        trial.run()
    (result,) = trial.results().values()
    assert "test" in result["evaluation"] and "zero_shot" not in result


@pytest.mark.parametrize(
    ("gone", "encoder", "error"),
    [
        ("piqa", "--bpe characters", r"requests '.*' of scale small: has no piqa\.jsonl; see"),
        ("", "", "encoder '' of scale small: has no --bpe"),
        ("", "--bpe", "encoder '--bpe' of scale small: has no --bpe"),
        (
            "",
            "--sentencepiece-model x --bpe sentencepiece",
            "encoder of scale small: --sentencepiece-model x: there is no such file",
        ),
    ],
)
def test_zero_shot_is_looked_at_before_any_training(
    gone: str, encoder: str, error: str, tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    trial.ask_for_zero_shot(encoder)
    if gone:
        (tmp_path / "requests" / f"{gone}.jsonl").unlink()
    with pytest.raises(SystemExit, match=error):
        trial.run()
    assert calls == []
