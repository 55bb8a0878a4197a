"""Training steps of models and optimizers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from tests.examples.benchmark.figures import check_figures


def test_train_step(scripts: dict[str, ModuleType]) -> None:
    train_step = scripts["train_step"]
    runs = (("avgk", "adam"), ("avgk", "sffn_adam"), ("hash_layer", "sffn_adam"))
    rows = train_step.measure(2, runs, context=8, sentences=2)
    assert [(row["model"], row["optimizer"]) for row in rows] == list(runs)
    for row in rows:
        check_figures(row)
        assert row["tokens_per_second"] > 0
        assert row["stands_for"].startswith("fairseq-train DATA --user-dir fairseq_sffn")


def test_train_step_trains(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    train_step = scripts["train_step"]
    words = "".join(f"w{i} 1\n" for i in range(train_step.VOCABULARY - 4))
    (tmp_path / "dict.txt").write_text(words)
    config = train_step.training_config("hash_layer", "adam", str(tmp_path), 8, 2)
    assert config.dataset.batch_size == 2 and config.optimization.clip_norm == 1
    trainer = train_step.build_trainer(config)
    batch = train_step.random_batch(8, 2)
    assert batch["target"][:, :-1].equal(batch["net_input"]["src_tokens"][:, 1:])
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step([batch])
    assert trainer.get_num_updates() == 1
    changed = [name for name, p in trainer.model.named_parameters() if not p.equal(before[name])]
    assert any("values" in name for name in changed)
