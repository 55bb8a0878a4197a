"""Tables and scales as files."""

from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_sffn.study import files
from fairseq_sffn.study.figures import FIGURES
from fairseq_sffn.study.files import load_scale, load_table
from fairseq_sffn.study.plan import Cell, Row, row_cells
from fairseq_sffn.study.tables import KINDS
from tests.study import made

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
        (
            '"perplexity"',
            '"perplexed"',
            r"t\.toml: kind 'perplexed': is none of taxonomy, .*routing",
        ),
        ('"perplexity"', '"zero_shot"', r"t\.toml: kind 'zero_shot': needs zero_shot = true"),
        ('title = "T"', 'title = "T"\nfigure = "pie"', r"figure 'pie': is none of lines, .*bars"),
        ('title = "T"', 'title = "T"\nfigure = "lines"', r"'lines': no row has both group and x"),
        ('title = "T"', 'title = "T"\nfigure = "gap"', r"'gap': needs rows of group 'dense' and"),
        ('title = "T"', 'title = "T"\nname = "u"', r"t\.toml: name 'u': the file's name is it"),
        ('title = "T"', "title = 3", r"t\.toml: title 3: must be a text"),
        ('title = "T"', 'title = "T"\nzero_shot = 1', r"zero_shot 1: must be true or false"),
        ("seeds = [3]", "seeds = 3", r"t\.toml: rows\[1\]: seeds 3: must be a list"),
        ("seeds = [3]", "seeds = [1.5]", r"rows\[1\]: seeds\[0\] 1\.5: must be a whole number"),
        ("seeds = [3]", "seeds = [true]", r"rows\[1\]: seeds\[0\] True: must be a whole number"),
        ("seeds = [1, 2]", 'seeds = "12"', r"rows\[0\]: seeds '12': must be a list"),
        ("seeds = [3]", "seeds = [3, 3]", r"row 'Avg-K': seeds \[3, 3\]: are not all different"),
        ("seeds = [3]", "seeds = []", r"row 'Avg-K': seeds: is empty"),
        ("seeds = [3]", "length = 0", r"rows\[1\]: length 0: must be above 0"),
        ("seeds = [3]", "length = nan", r"rows\[1\]: length nan: must be a number"),
        ("seeds = [3]", 'length = "2"', r"rows\[1\]: length '2': must be a number"),
        ("seeds = [3]", "lr = -1", r"rows\[1\]: lr -1: must be above 0"),
        ("seeds = [3]", 'lr = "x"', r"rows\[1\]: lr 'x': must be a number"),
        ("seeds = [3]", 'x = "ffn"', r"row 'Avg-K': x 'ffn': must be a number or '\{ffn\}'"),
        ("--sffn-block-size ", "--a 'b", r"row 'Avg-K': flags .*No closing quotation"),
        ("--sffn-block-size ", "--lr 1", r"row 'Avg-K': flags: --lr: is set by what the file says"),
        ("--sffn-block-size ", "--seed=1", r"flags: --seed=1: is set by what the file says"),
        ("--sffn-block-size ", "--max-sentences 1", r"flags: --max-sentences: is set by"),
        ("--sffn-block-size ", "--max-tokens 1", r"flags: --max-tokens: is set by"),
        ("--sffn-block-size ", "-a x", r"row 'Avg-K': flags: -a: is set by what the file says"),
        ("--sffn-block-size ", "--max-epoch 1", r"--max-epoch: trainings end after their updates"),
        ("seeds = [3]", "x = 0", r"row 'Avg-K': x 0: must be above 0"),
        ("--sffn-block-size ", "--no-save", r"flags: --no-save: the last checkpoint is evaluated"),
        ("--sffn-block-size ", "--train-subset=x", r"flags: --train-subset=x: trainings read the"),
        ("--sffn-block-size ", "--valid-subset x", r"flags: --valid-subset: trainings read the"),
        ("--sffn-block-size ", "--distributed-world-size 1", r"--distributed-world-size: is set"),
        ('"--sffn-block-size  {ffn}"', "[]", r"rows\[1\]: flags \[\]: must be a text"),
        ("[[claims]]", 'claims = "x"\n[[other]]', r"t\.toml: (claims|other)"),
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
        ("= 1000", "= 1000\n[launchers.a]\nprocesse = 2", "launchers.a: processe: is none of"),
        ("= 1000", "= 1000\n[launchers.a]\nprocesses = 0", "a: processes 0: must be above 0"),
        ("= 1000", "= 1000\nlaunchers.a = 3", "t.toml: launchers.a 3: must be a table"),
        ("= 1000", "= 1000\n[launchers]", "t.toml: launchers: is empty"),
        ("= 1000", "= 1000\nrelative_time.pkm = 'x'", "relative_time.pkm 'x': must be a number"),
        ("= 1000", "= 1000\nwarmup_share = 7", "warmup_share 7: must be at most 1"),
        ("= 1000", "= 0", "tokens_per_second 0: must be above 0"),
        ("updates = 40", 'updates = "40"', "updates '40': must be a whole number"),
        ("updates = 40", "updates = -5", "updates -5: must be above 0"),
        ("updates = 40", "updates = 40\nsave_interval = 0", "save_interval 0: must be above 0"),
        ("updates = 40", "updates = 40\nname = 'u'", "t.toml: name 'u': the file's name is it"),
        ("[1e-3, 2e-3]", "2e-3", "learning_rates 0.002: must be a list"),
        ("[1e-3, 2e-3]", "[1e-3, 0]", r"learning_rates \[0.001, 0\]: must be above 0"),
        ("--dropout", "--max-update 3 --dropout", "t.toml: flags: --max-update: is set by what"),
    ],
)
def test_wrong_scales(old: str, new: str, error: str, tmp_path: Path) -> None:
    assert old in SCALE
    with pytest.raises(SystemExit, match=error):
        load_scale(write(tmp_path, SCALE.replace(old, new)))


def test_whole_numbers_stand_for_others(tmp_path: Path) -> None:
    """As a rate of 1 would give other keys than one of 1.0."""
    table = load_table(write(tmp_path, TABLE.replace("seeds = [3]", "lr = 1")))
    scale = load_scale(write(tmp_path, SCALE + "warmup_share = 1"))
    numbers = table.rows[1].lr, scale.warmup_share, scale.updates
    assert [type(number) for number in numbers] == [float, float, int]


def test_a_table_without_rows(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"t\.toml: rows: there are none"):
        load_table(write(tmp_path, 'title = "T"\nkind = "perplexity"\nrows = []'))


def test_kinds_and_figures_are_those_that_are_rendered() -> None:
    assert set(files.KINDS) == set(KINDS)
    assert set(files.FIGURES) == {"", *FIGURES}


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
    keys = {c.key(s) for row in rows for s in (scale, wide) for c in row_cells(row, s, 0.1)}
    assert len(keys) == 1
