"""Reading tables and scales from files."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from experiments.figures import FIGURES
from experiments.files import REFUSED, Launcher, Row, Table, load_scale, load_table
from experiments.plan import Run, Setting, row_runs, train_arguments
from experiments.report import KINDS
from tests.examples.experiments import made

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
SCALE = made.scale_file("--dropout 0   --cpu")
WRONG_TABLES = {
    'title = "T"': [
        ('titel = "T"', r"t\.toml: titel: is unknown$"),
        ('title = "T"\nfigure = "pie"', r"figure 'pie': Input should be '', 'lines', .*'bars'"),
        ('title = "T"\nmargin = 1', r"margin 1: Input should be less than 1"),
        ('title = "T"\nfigure = "lines"', r"'lines': no row has both group and x"),
        ('title = "T"\nfigure = "gap"', r"'gap': needs rows of group 'dense' and"),
        ('title = "T"\ntrend_from = 3', r"trend_from 3\.0: needs figure = 'gap'"),
        ('title = "T"\nname = "u"', r"t\.toml: name 'u': is the name of the file"),
        ("title = 3", r"t\.toml: title 3: Input should be a valid string"),
        ('title = "T"\nzero_shot = 1', r"zero_shot 1: Input should be a valid boolean"),
    ],
    'title = "T"\n': [("", r"t\.toml: title: Field required")],
    ', model = "dense"': [("", r"t\.toml: rows\[0\]\.model: Field required")],
    "seeds = [3]": [
        ("sedes = [3]", r"t\.toml: rows\[1\]\.sedes: is unknown"),
        ("seeds = 3", r"t\.toml: rows\[1\]\.seeds 3: Input should be a valid array"),
        ("seeds = [1.5]", r"rows\[1\]\.seeds\[0\] 1\.5: Input should be a valid int"),
        ("seeds = [true]", r"rows\[1\]\.seeds\[0\] True: Input should be a valid int"),
        ("seeds = [3, 3]", r"row 'Avg-K': seeds \[3, 3\]: are not all different"),
        ("seeds = []", r"row 'Avg-K': seeds: is empty"),
        ("length = 0", r"rows\[1\]\.length 0: Input should be greater than 0"),
        ("length = nan", r"rows\[1\]\.length nan: Input should be a finite number"),
        ('length = "2"', r"rows\[1\]\.length '2': Input should be a valid number"),
        ("lr = -1", r"rows\[1\]\.lr -1: Input should be greater than 0"),
        ('lr = "x"', r"rows\[1\]\.lr 'x': Input should be a valid number"),
        ('x = "ffn"', r"rows\[1\]\.x.* 'ffn': Input should be a valid number"),
        ("x = 0", r"rows\[1\]\.x.* 0: Input should be greater than 0"),
    ],
    '"dense", model': [('"Avg-K", model', r"t\.toml: label 'Avg-K': two rows have it")],
    'worse = "dense"': [('worse = "x"', r"t\.toml: claim about 'x': no row has this label")],
    'better = "Avg-K"\n': [("", r"t\.toml: claims\[0\]\.better: Field required")],
    "rows = [": [("rows = {", r"t\.toml: cannot be read")],
    '"perplexity"': [
        ('"perplexed"', r"t\.toml: kind 'perplexed': Input should be 'taxonomy', .*'routing'"),
        ('"zero_shot"', r"t\.toml: kind 'zero_shot': needs zero_shot = true"),
    ],
    "seeds = [1, 2]": [('seeds = "12"', r"rows\[0\]\.seeds '12': Input should be a valid array")],
    "--sffn-block-size ": [
        ("--a 'b", r"row 'Avg-K': flags .*No closing quotation"),
        ("--lr 1", r"row 'Avg-K': flags: --lr: is set by what the file says"),
        ("--seed=1", r"flags: --seed=1: is set by what the file says"),
        ("--max-sentences 1", r"flags: --max-sentences: is set by"),
        ("--max-tokens 1", r"flags: --max-tokens: is set by"),
        ("-a x", r"row 'Avg-K': flags: -a: is set by what the file says"),
        ("--max-epoch 1", r"--max-epoch: runs end after their updates"),
        ("--no-save", r"flags: --no-save: the last checkpoint is evaluated"),
        ("--train-subset=x", r"flags: --train-subset=x: runs read the"),
        ("--valid-subset x", r"flags: --valid-subset: runs read the"),
        ("--distributed-world-size 1", r"--distributed-world-size: is set"),
    ],
    '"--sffn-block-size  {ffn}"': [
        ("[]", r"rows\[1\]\.flags \[\]: Input should be a valid string")
    ],
    "[[claims]]": [('claims = "x"\n[[other]]', r"t\.toml: (claims|other)")],
}
"""Part of the table -> texts that replace it, each with its error."""
WRONG_SCALES = {
    "updates = 40\n": [("", "updates: Field required")],
    "updates": [("udpates", "udpates: is unknown")],
    "learning_rates = [1e-3, 2e-3]": [
        ("learning_rates = []", r"learning_rates \[\]: Tuple should have at least 1 item")
    ],
    "= 1000": [
        ("= 1000\n[launchers.a]\nprocesse = 2", "launchers.a.processe: is unknown"),
        (
            "= 1000\n[launchers.a]\nprocesses = 0",
            "launchers.a.processes 0: Input should be greater than 0",
        ),
        ("= 1000\nlaunchers.a = 3", "t.toml: launchers.a 3: Input should be an object"),
        ("= 1000\n[launchers]", "t.toml: launchers {}: .* should have at least 1 item"),
        (
            "= 1000\nrelative_time.pkm = 'x'",
            "relative_time.pkm 'x': Input should be a valid number",
        ),
        ("= 1000\nwarmup_share = 7", "warmup_share 7: Input should be less than or equal to 1"),
        ("= 0", "tokens_per_second 0: Input should be greater than 0"),
    ],
    "updates = 40": [
        ('updates = "40"', "updates '40': Input should be a valid int"),
        ("updates = -5", "updates -5: Input should be greater than 0"),
        ("updates = 40\nsave_interval = 0", "save_interval 0: Input should be greater than 0"),
        ("updates = 40\nname = 'u'", "t.toml: name 'u': is the name of the file"),
    ],
    "[1e-3, 2e-3]": [
        ("2e-3", "learning_rates 0.002: Input should be a valid array"),
        ("[1e-3, 0]", r"learning_rates\[1\] 0: Input should be greater than 0"),
    ],
    "--dropout": [("--max-update 3 --dropout", "t.toml: flags: --max-update: is set by what")],
}
"""The same for the scale."""


def cases(wrong: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    return [(old, *change) for old, changes in wrong.items() for change in changes]


def write(folder: Path, text: str, name: str = "t.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_table(tmp_path: Path) -> None:
    table = load_table(write(tmp_path, TABLE))
    assert (table.name, table.rows[0].seeds, table.rows[1].seeds) == ("t", (1, 2), (3,))
    runs = row_runs(table.rows[1], made.scale(), Setting(0.5))
    assert runs == [Run("avgk", "--sffn-block-size 512", 3, 0.5, 40, 8)]
    longer = replace(table.rows[0], length=2.5, batch=0.5)
    assert {(c.updates, c.batch_size) for c in row_runs(longer, made.scale(), Setting(0.5))} == {
        (100, 4)
    }


def test_keys_beside_the_rows_are_for_those_without_them(tmp_path: Path) -> None:
    text = TABLE.replace("seeds = [3]", "seeds = [3], lr = 1.0, init_scale = 4.0")
    rows = load_table(write(tmp_path, "lr = 2.0\ninit_scale = 3.0\n" + text)).rows
    found = [(row.seeds, row.lr, row.init_scale) for row in rows]
    assert found == [((1, 2), 2.0, 3.0), ((3,), 1.0, 4.0)]


@pytest.mark.parametrize(("old", "new", "error"), cases(WRONG_TABLES))
def test_wrong_tables(old: str, new: str, error: str, tmp_path: Path) -> None:
    assert old in TABLE
    with pytest.raises(SystemExit, match=error) as stopped:
        load_table(write(tmp_path, TABLE.replace(old, new)))
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(("old", "new", "error"), cases(WRONG_SCALES))
def test_wrong_scales(old: str, new: str, error: str, tmp_path: Path) -> None:
    assert old in SCALE
    with pytest.raises(SystemExit, match=error):
        load_scale(write(tmp_path, SCALE.replace(old, new)))


def test_whole_numbers_stand_for_others(tmp_path: Path) -> None:
    """A rate of 1 would otherwise give other keys than a rate of 1.0."""
    table = load_table(write(tmp_path, TABLE.replace("seeds = [3]", "lr = 1")))
    scale = load_scale(write(tmp_path, SCALE + "warmup_share = 1"))
    numbers = table.rows[1].lr, scale.warmup_share, scale.updates
    assert [type(number) for number in numbers] == [float, float, int]


def test_a_table_without_rows(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"t\.toml: rows \[\]: Tuple should have at least 1 item"):
        load_table(write(tmp_path, 'title = "T"\nkind = "perplexity"\nrows = []'))


def test_kinds_and_figures_are_those_that_are_rendered() -> None:
    kinds, figures = (get_args(get_type_hints(Table)[name]) for name in ("kind", "figure"))
    assert set(kinds) == set(KINDS)
    assert set(figures) == {"", *FIGURES}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"none\.toml: cannot be read"):
        load_table(tmp_path / "none.toml")


def test_labels_and_spaces_are_no_settings(tmp_path: Path) -> None:
    scale = load_scale(write(tmp_path, SCALE))
    wide = load_scale(write(tmp_path, SCALE.replace("0   --cpu", "0\\n --cpu")))
    rows = [
        Row("a", "avgk", "--sffn-block-size 64"),
        Row("b", "avgk", "  --sffn-block-size   64 ", group="g", x=3),
    ]
    keys = {c.key(s) for row in rows for s in (scale, wide) for c in row_runs(row, s, Setting(0.1))}
    assert len(keys) == 1


def test_no_file_sets_a_flag_that_a_run_sets() -> None:
    run = Run("avgk", "", seed=1, lr=1.0, updates=1, batch_size=1)
    words = train_arguments(run, made.scale(flags=""), Launcher(), "data", "saved", "plugin")
    ours = {word for word in words if word.startswith("--")}
    also = {"-a", "--max-sentences", "--max-tokens"}  # other names of two, and a limit of one
    assert {*REFUSED["is set by what the file says elsewhere"].split()} == ours | also
