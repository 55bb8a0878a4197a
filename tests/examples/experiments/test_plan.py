"""The runs that tables ask for."""

from dataclasses import fields, replace
from typing import Any

import pytest

from experiments.files import Launcher, Row, Scale
from experiments.plan import Run, Setting, final_runs, row_runs, sweep_runs, train_arguments
from tests.examples.experiments import made

RUN = Run("avgk", "--sffn-block-size 64", 1, 0.001, 40, 8)
CHANGES: dict[str, Any] = {
    **{"model": "switch", "flags": "--sffn-block-size 16", "seed": 2, "lr": 0.002},
    **{"updates": 41, "batch_size": 16},
}
OF_SCALE: dict[str, Any] = {
    **{"size": "gpt3_medium", "tokens_per_sample": 32, "warmup_share": 0.2},
    "flags": "--dropout 0.1 --cpu",
}


def test_every_setting_changes_the_key() -> None:
    assert set(CHANGES) == {f.name for f in fields(Run)}
    keys = [RUN.key(made.scale())]
    keys += [replace(RUN, **{name: value}).key(made.scale()) for name, value in CHANGES.items()]
    keys += [RUN.key(made.scale(**{name: value})) for name, value in OF_SCALE.items()]
    assert len(set(keys)) == 1 + len(CHANGES) + len(OF_SCALE)


def test_nothing_else_changes_the_key() -> None:
    others: dict[str, Any] = {
        **{"name": "other", "data": "x", "domains": "x", "updates": 7, "batch_size": 3},
        **{"dictionary": 7, "ffn_embed_dim": 3, "learning_rates": (9.0,), "sweep_share": 0.5},
        **{"init_scales": (9.0,), "finalists": 3},
        **{"tokens_per_second": 3.0, "encoder": "x", "requests": "x", "save_interval": 3},
        **{"test_bytes_per_token": 2.0, "relative_time": {"avgk": 2.0}},
        **{"launchers": {"a": Launcher("b", 2)}},
    }
    assert set(others) | set(OF_SCALE) == {f.name for f in fields(Scale)}
    for name, value in others.items():
        assert RUN.key(made.scale(**{name: value})) == RUN.key(made.scale()), name


def test_a_sweep_is_its_models_unless_a_row_wants_its_own() -> None:
    scale = made.scale()
    row = Row("a", "avgk", "--sffn-block-size 16")
    runs = sweep_runs(row, scale)
    assert [(c.lr, c.flags, c.seed, c.updates) for c in runs.values()] == [
        (0.001, "", 1, 13),
        (0.002, "", 1, 13),
    ]
    assert [*runs] == [Setting(0.001), Setting(0.002)]
    assert sweep_runs(replace(row, length=4.0, batch=2.0, seeds=(5,)), scale) == runs
    assert {c.flags for c in sweep_runs(replace(row, sweep=True), scale).values()} == {row.flags}
    for nothing in (replace(row, lr=0.1), replace(row, seeds=())):
        assert sweep_runs(nothing, scale) == {}
    assert sweep_runs(row, made.scale(learning_rates=(0.1,))) == {}


def test_a_sweep_of_learning_rates_and_initial_scales() -> None:
    scale = made.scale(init_scales=(1.0, 2.0, 0.5))
    row = Row("a", "avgk", "--sffn-block-size 16")
    runs = sweep_runs(row, scale)
    flags = ["", "--sffn-init-scale 2", "--sffn-init-scale 0.5"]
    assert [(run.lr, run.flags) for run in runs.values()] == [
        (lr, flag) for lr in (0.001, 0.002) for flag in flags
    ]
    assert [*runs] == [Setting(lr, factor) for lr in (0.001, 0.002) for factor in (1, 2, 0.5)]
    for name, fixed in {"lr": 0.1, "init_scale": 4.0}.items():
        assert sweep_runs(replace(row, **{name: fixed}), scale) == runs  # the other is open
    assert sweep_runs(replace(row, lr=0.1, init_scale=4.0), scale) == {}
    assert sweep_runs(replace(row, lr=0.1), made.scale(init_scales=(2.0,))) == {}
    finalists = final_runs(row, scale, [Setting(0.002, 2.0), Setting(0.001)])
    assert [(run.lr, run.flags, run.updates) for run in finalists.values()] == [
        (0.002, "--sffn-init-scale 2", 40),
        (0.001, "", 40),
    ]


def test_flags_may_depend_on_the_width() -> None:
    def flags_of(text: str) -> str:
        (run,) = row_runs(Row("a", "avgk", text), made.scale(ffn_embed_dim=96), Setting(0.1))
        return run.flags

    assert flags_of("--x {ffn} --y {ffn/3} --z {ffn/96}") == "--x 96 --y 32 --z 1"
    with pytest.raises(SystemExit, match=r"row 'a': flags: \{ffn/5\}: does not divide the FFN"):
        flags_of("--x {ffn/5}")


def test_the_initial_scale_of_a_row() -> None:
    def flags_of(row: Row, init_scale: float) -> tuple[str, str]:
        (run,) = row_runs(row, made.scale(), Setting(0.1, init_scale))
        return run.model, run.flags

    row = Row("a", "avgk", "--sffn-block-size  16")
    assert flags_of(row, 1.0) == ("avgk", "--sffn-block-size 16")
    assert flags_of(row, 4.0) == ("avgk", "--sffn-block-size 16 --sffn-init-scale 4")
    # The dense model with another scale is HashLayer with one block.
    dense = Row("d", "dense", "--sffn-glu silu")
    assert flags_of(dense, 1.0) == ("dense", "--sffn-glu silu")
    everything = "--sffn-expansion 1 --sffn-glu silu --sffn-init-scale 0.5"
    assert flags_of(dense, 0.5) == ("hash_layer", everything)
    given = replace(row, flags="--sffn-init-scale 2")
    assert flags_of(given, 1.0) == ("avgk", "--sffn-init-scale 2")
    for swept in (sweep_runs, lambda *args: row_runs(*args, Setting(0.1))):
        with pytest.raises(SystemExit, match=r"^row 'a': flags: --sffn-init-scale: is chosen by"):
            swept(replace(given, sweep=True), made.scale(init_scales=(1.0, 2.0)))


def test_architectures_and_intervals() -> None:
    def value(flag: str, **changes: Any) -> str:
        words = train_arguments(RUN, made.scale(**changes), Launcher(), "data", "saved", "plugin")
        return words[words.index(flag) + 1]

    assert value("--arch") == "transformer_lm_avgk_tiny"
    assert value("--arch", size="") == "transformer_lm_avgk"
    assert value("--save-interval-updates") == "10"
    assert value("--save-interval-updates", save_interval=3) == "3"
    assert value("--validate-interval-updates", save_interval=3) == "3"


def test_processes_are_as_many_as_the_launcher_says() -> None:
    """fairseq-train would start one for each GPU."""
    name = "--distributed-world-size"
    for launcher, count in ((Launcher(), "1"), (Launcher(processes=2), "2")):
        words = train_arguments(RUN, made.scale(), launcher, "data", "saved", "plugin")
        assert words[words.index(name) + 1] == count
    words = train_arguments(RUN, made.scale(), Launcher("torchrun", 2), "data", "saved", "plugin")
    assert name not in words


def test_arguments_divide_the_batch() -> None:
    launcher = Launcher("torchrun", processes=2, update_freq=2)
    words = train_arguments(RUN, made.scale(), launcher, "data", "saved", "plugin")
    for flag, value in (
        *(("--batch-size", "2"), ("--update-freq", "2"), ("--max-update", "40")),
        *(("--arch", "transformer_lm_avgk_tiny"), ("--seed", "1"), ("--warmup-updates", "4")),
        ("--sffn-block-size", "64"),
    ):
        assert words[words.index(flag) + 1] == value
    with pytest.raises(SystemExit, match="batch_size 8: is not divided by 3 processes"):
        train_arguments(RUN, made.scale(), Launcher("", 3), "data", "saved", "plugin")
