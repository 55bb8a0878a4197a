"""Tables and scales, and what they ask for."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from study import made

from fairseq_sffn.study.plan import (
    Cell,
    Launcher,
    Row,
    Scale,
    load_scale,
    load_table,
    row_cells,
    sweep_cells,
    train_arguments,
)

TABLE = """
title = "T"
kind = "perplexity"
seeds = [1, 2]
rows = [
    { label = "dense", model = "dense" },
    { label = "Avg-K", model = "avgk", flags = "--sffn-block-size  {ffn}", seeds = [3] },
]
[[claims]]
text = "Avg-K is better."
better = "Avg-K"
worse = "dense"
"""
SCALE = """
size = "tiny"
data = "data"
domains = "domains"
dictionary = 100
updates = 40
batch_size = 8
tokens_per_sample = 16
ffn_embed_dim = 512
learning_rates = [1e-3, 2e-3]
flags = "--dropout 0   --cpu"
tokens_per_second = 1000
"""


def write(folder: Path, text: str, name: str = "t.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_table(tmp_path: Path) -> None:
    table = load_table(write(tmp_path, TABLE))
    assert (table.name, table.rows[0].seeds, table.rows[1].seeds) == ("t", (1, 2), (3,))
    cells = row_cells(table.rows[1], made.scale(), 0.5)
    assert cells == [Cell("avgk", "--sffn-block-size 512", 3, 0.5, 40, 8)]
    longer = replace(table.rows[0], length=2.5, batch=0.5)
    assert {(c.updates, c.batch_size) for c in row_cells(longer, made.scale(), 0.5)} == {(100, 4)}


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('title = "T"', 'titel = "T"', r"t\.toml: titel: is none of .*title"),
        ('title = "T"\n', "", r"t\.toml: title: is missing"),
        (', model = "dense"', "", r"t\.toml: rows\[0\]: model: is missing"),
        ("seeds = [3]", "sedes = [3]", r"t\.toml: rows\[1\]: sedes: is none of"),
        ('"dense", model', '"Avg-K", model', r"t\.toml: label 'Avg-K': is that of two rows"),
        ('worse = "dense"', 'worse = "x"', r"t\.toml: claim about 'x': is the label of no row"),
        ('better = "Avg-K"\n', "", r"t\.toml: claims\[0\]: better: is missing"),
        ("rows = [", "rows = {", r"t\.toml: cannot be read"),
        ("rows = [", "rows = []\nnote = [", r"t\.toml: rows: there are none"),
    ],
)
def test_wrong_tables(old: str, new: str, error: str, tmp_path: Path) -> None:
    assert old in TABLE
    with pytest.raises(SystemExit, match=error) as stopped:
        load_table(write(tmp_path, TABLE.replace(old, new)))
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("updates = 40\n", "", "updates: is missing"),
        ("updates", "udpates", "udpates: is none of"),
        ("learning_rates = [1e-3, 2e-3]", "learning_rates = []", "learning_rates: is empty"),
        ("flags", "[launchers.a]\nprocesse = 2\n[x]\nflags", "launchers.a: processe: is none of"),
    ],
)
def test_wrong_scales(old: str, new: str, error: str, tmp_path: Path) -> None:
    assert old in SCALE
    with pytest.raises(SystemExit, match=error):
        load_scale(write(tmp_path, SCALE.replace(old, new)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"none\.toml: cannot be read"):
        load_table(tmp_path / "none.toml")


CELL = Cell("avgk", "--sffn-block-size 64", 1, 0.001, 40, 8)
CHANGES: dict[str, Any] = {
    **{"model": "switch", "flags": "--sffn-block-size 16", "seed": 2, "lr": 0.002},
    **{"updates": 41, "batch_size": 16},
}
OF_SCALE: dict[str, Any] = {
    **{"size": "gpt3_medium", "tokens_per_sample": 32, "warmup_share": 0.2},
    "flags": "--dropout 0.1 --cpu",
}


def test_every_setting_changes_the_key() -> None:
    assert set(CHANGES) == {f.name for f in fields(Cell)}
    keys = [CELL.key(made.scale())]
    keys += [replace(CELL, **{name: value}).key(made.scale()) for name, value in CHANGES.items()]
    keys += [CELL.key(made.scale(**{name: value})) for name, value in OF_SCALE.items()]
    assert len(set(keys)) == 1 + len(CHANGES) + len(OF_SCALE)


def test_nothing_else_changes_the_key() -> None:
    others: dict[str, Any] = {
        **{"name": "other", "data": "x", "domains": "x", "updates": 7, "batch_size": 3},
        **{"dictionary": 7, "ffn_embed_dim": 3, "learning_rates": (9.0,), "sweep_share": 0.5},
        **{"tokens_per_second": 3.0, "encoder": "x", "requests": "x"},
        **{"relative_time": {"avgk": 2.0}, "launchers": {"a": Launcher("b", 2)}},
    }
    assert set(others) | set(OF_SCALE) == {f.name for f in fields(Scale)}
    for name, value in others.items():
        assert CELL.key(made.scale(**{name: value})) == CELL.key(made.scale()), name


def test_labels_and_spaces_are_no_settings(tmp_path: Path) -> None:
    scale = load_scale(write(tmp_path, SCALE))
    wide = load_scale(write(tmp_path, SCALE.replace("0   --cpu", "0\\n --cpu")))
    rows = [
        Row("a", "avgk", "--sffn-block-size 64"),
        Row("b", "avgk", "  --sffn-block-size   64 ", group="g", x=3),
    ]
    keys = {c.key(s) for row in rows for s in (scale, wide) for c in row_cells(row, s, 0.1)}
    assert len(keys) == 1


def test_a_sweep_is_its_models_unless_a_row_wants_its_own() -> None:
    scale = made.scale()
    row = Row("a", "avgk", "--sffn-block-size 16")
    cells = sweep_cells(row, scale)
    assert [(c.lr, c.flags, c.seed, c.updates) for c in cells] == [
        (0.001, "", 1, 13),
        (0.002, "", 1, 13),
    ]
    assert sweep_cells(replace(row, length=4.0, batch=2.0, seeds=(5,)), scale) == cells
    assert {c.flags for c in sweep_cells(replace(row, sweep=True), scale)} == {row.flags}
    for nothing in (replace(row, lr=0.1), replace(row, seeds=())):
        assert sweep_cells(nothing, scale) == []
    assert sweep_cells(row, made.scale(learning_rates=(0.1,))) == []


def test_arguments_share_out_the_batch() -> None:
    launcher = Launcher("torchrun", processes=2, update_freq=2)
    words = train_arguments(CELL, made.scale(), launcher, "data", "saved", "plugin")
    for flag, value in (
        *(("--batch-size", "2"), ("--update-freq", "2"), ("--max-update", "40")),
        *(("--arch", "transformer_lm_avgk_tiny"), ("--seed", "1"), ("--warmup-updates", "4")),
        ("--sffn-block-size", "64"),
    ):
        assert words[words.index(flag) + 1] == value
    with pytest.raises(SystemExit, match="batch_size 8: is not divided by 3 processes"):
        train_arguments(CELL, made.scale(), Launcher("", 3), "data", "saved", "plugin")
