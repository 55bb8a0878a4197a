"""``experiments report``, on results that were made up."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.files import Row, load_scale, load_table
from experiments.plan import Run, sweep_runs
from experiments.results import Results
from fairseq_sffn.tools.cost import cost_figures
from fairseq_sffn.tools.language_model import build_language_model
from tests.examples.experiments import made

SCALE = made.scale_file("--cpu --weight-decay 0.01")
ROWS = """
rows = [
    { label = "dense", model = "dense" },
    { label = "Avg-K", model = "avgk" },
    { label = "Switch", model = "switch" },
]
"""
TABLES = {
    "main": 'title = "Main"\nkind = "perplexity"\nfigure = "bars"\nseeds = [1, 2, 3]'
    + ROWS
    + '[[claims]]\ntext = "Avg-K beats dense."\nbetter = "Avg-K"\nworse = "dense"\n'
    + '[[claims]]\ntext = "Avg-K beats Switch."\nbetter = "Avg-K"\nworse = "Switch"\n',
    "balance": 'title = "Balance"\nkind = "balance"\nfigure = "load"\nrows = ['
    '{ label = "Avg-K", model = "avgk", flags = "--balance-loss-weight 0.1" },'
    '{ label = "dense", model = "dense" }]',
    "lines": 'title = "Lines"\nkind = "perplexity"\nfigure = "lines"\naxis = "length"\n'
    'note = "A note."\nrows = ['
    '{ label = "dense", model = "dense" },'
    '{ label = "a", model = "avgk", group = "Avg-K", x = 1 },'
    '{ label = "b", model = "avgk", length = 2, group = "Avg-K", x = "{ffn}" }]',
    "gap": 'title = "Gap"\nkind = "perplexity"\nfigure = "gap"\nrows = ['
    '{ label = "d", model = "dense", group = "dense" },'
    '{ label = "a", model = "avgk", group = "Avg-K" }]',
    "alone": 'title = "Gap of one"\nkind = "perplexity"\nfigure = "gap"\nrows = ['
    '{ label = "d", model = "dense", length = 9, group = "dense" },'
    '{ label = "a", model = "avgk", group = "Avg-K" }]',
    "flops": 'title = "FLOPs"\nkind = "perplexity"\nfigure = "flops"' + ROWS,
    "routing": 'title = "Routing"\nkind = "routing"\nfigure = "routing"\nseeds = [1, 2]\n'
    'rows = [{ label = "Switch", model = "switch" }]',
    "zero": 'title = "Zero"\nkind = "zero_shot"\nzero_shot = true' + ROWS,
    "methods": 'title = "Methods"\nkind = "taxonomy"\nseeds = []\nrows = ['
    '{ label = "dense", model = "dense" }, { label = "Avg-K", model = "avgk" }]',
    "later": 'title = "Later"\nkind = "perplexity"\nfigure = "bars"\nrows = ['
    '{ label = "dense", model = "dense", length = 9 }]',
}
TEST = {"dense": 100.0, "avgk": 90.0, "switch": 95.0}
SPREAD = (0.0, 2.0, 7.0)
BLOCKS = {"dense": 0, "avgk": 128, "switch": 16}


def zero_shot(right: float, word: float) -> dict[str, Any]:
    """Make an output of ``fairseq-sffn zero-shot --json``."""
    choice = {
        **{"task": "piqa", "documents": 1000, "accuracy": 0.9, "standard_error": 0.5},
        **{"accuracy_norm": right, "standard_error_norm": 0.02, "random": 0.5},
        **{"requests": 2000, "cut_requests": 1234, "requests_in_pieces": 5},
    }
    last = {
        **{"task": "lambada", "documents": 500, "accuracy": word, "standard_error": 0.01},
        **{"accuracy_norm": None, "standard_error_norm": None, "random": 0.001},
    }
    return {"checkpoint": "c", "seed": 1, "tasks": [choice, last]}


def make(row: Row, run: Run) -> Any:
    own = 3.0 if (run.model, run.seed) == ("switch", 2) else 0.0  # besides the seed's effect
    test = TEST[run.model] + SPREAD[run.seed - 1] + own
    found = made.result(test, BLOCKS[run.model], run.seed, valid=50.0)
    if run.model != "switch":
        found["zero_shot"] = zero_shot(0.5 if run.model == "dense" else 0.55, 0.0015)
    return found


def some_missing(row: Row, run: Run) -> Any:
    gone = run.updates == 360 or (run.model, run.seed) == ("switch", 3)
    return None if gone else make(row, run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with tables, a scale and results."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "scales").mkdir()
    (folder / "scales" / "small.toml").write_text(SCALE)
    for name, text in TABLES.items():
        (folder / f"{name}.toml").write_text(text)
    write_results(folder, some_missing)
    return folder


def write_results(folder: Path, make: Callable[[Row, Run], Any]) -> None:
    scale = load_scale(folder / "scales" / "small.toml")
    results = Results(folder / "results" / "small", scale)
    for name in TABLES:
        made.fill(results, load_table(folder / f"{name}.toml").rows, make)


def report(folder: Path, *flags: str | Path) -> str:
    """Run the command and return its output."""
    out = io.StringIO()
    scale = folder / "scales" / "small.toml"
    with contextlib.redirect_stdout(out):
        main(["report", str(folder), "--scale", str(scale), *map(str, flags)])
    return out.getvalue()


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    return report(folder)


def section(printed: str, title: str) -> str:
    """Return the section of a table."""
    return re.split(r"^## ", printed.partition(f"## {title}\n")[2], flags=re.M)[0]


def cells(text: str, label: str) -> list[str]:
    """Return a row's cells without the label, from the first table that has it."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def test_perplexity(printed: str) -> None:
    text = section(printed, "Main")
    scale = made.scale(flags="--cpu --weight-decay 0.01")
    model = build_language_model("transformer_lm_dense_tiny", 100, 16, [])
    tokens = scale.updates * scale.batch_size * scale.tokens_per_sample
    cost = cost_figures(model, 16, tokens)
    assert cells(text, "dense") == [
        *(f"{cost['params'] / 1e6:.2f}M", f"{cost['train_zettaflops'] * 1e9:#.4g}", "0.002"),
        *("50.0 ± 0.0", "103.0 ± 3.6", "123.0 ± 3.6"),
    ]
    assert cells(text, "Avg-K")[3:6] == ["50.0 ± 0.0", "93.0 ± 3.6", "113.0 ± 3.6"]
    assert "Trained on 2 cores of a processor." in text
    domains = text[text.index("| set | dense | Avg-K | Switch |") :]
    assert cells(domains, "fiction")[:2] == ["113 ± 4", "103 ± 4"]
    assert cells(domains, "law")[:2] == ["133 ± 4", "123 ± 4"]


def test_bits_per_byte(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / "scales" / "small.toml").open("a") as scale:
        scale.write("test_bytes_per_token = 4\n")
    text = section(report(copy, "--no-figures", "--tables", "main"), "Main")
    bits = [math.log2(100 + spread) / 4 for spread in SPREAD]
    sd = statistics.stdev(bits)
    assert cells(text, "dense")[4:6] == ["103.0 ± 3.6", f"{statistics.mean(bits):.3f} ± {sd:.3f}"]
    assert cells(text, "model")[5] == "test bits/byte"


def test_some_tables_alone(printed: str, folder: Path) -> None:
    some = report(folder, "--no-figures", "--tables", "main", "zero")
    assert re.findall(r"^## (.*)", some, flags=re.M) == ["Main", "Zero"]
    assert section(some, "Main").strip() == section(printed, "Main").strip()
    with pytest.raises(SystemExit, match=r"--tables x: is none of .*main"):
        report(folder, "--tables", "main", "x")


def test_learning_rates(printed: str, folder: Path, tmp_path: Path) -> None:
    def rates(printed: str) -> str:
        text = section(printed, "Main")
        return text[text.index("| model | 0.001 | 0.002 |") :]

    for label in ("dense", "Avg-K", "Switch"):
        assert cells(rates(printed), label) == ["8.0", "**4.0**"]
    only_changed = section(printed, "Balance").partition("| model | 0.001")[2]
    assert cells(only_changed, "avgk") == ["8.0", "**4.0**"]
    assert "after 13 updates" in rates(printed)  # a third of 40
    assert "At an end" not in rates(printed)  # of two rates, each is

    shutil.copytree(folder, tmp_path / "copy")
    copy = tmp_path / "copy"
    scale = load_scale(copy / "scales" / "small.toml")
    results = Results(copy / "results" / "small", scale)
    first = next(iter(sweep_runs(Row("s", "switch"), scale).values()))
    results.path(first).unlink()
    text = rates(report(copy, "--no-figures"))
    assert cells(text, "Switch") == ["", "4.0"]  # not chosen before the last run
    results.add(first, made.swept(3.0))
    for model, number in {"dense": 0, "avgk": 1}.items():
        gone, diverged = [*sweep_runs(Row(model, model), scale).values()][:: 1 if number else -1]
        results.path(gone).unlink()
        results.add(diverged, made.swept(None))
    text = rates(report(copy, "--no-figures"))
    assert cells(text, "dense") == ["diverged", ""]
    assert cells(text, "Avg-K") == ["", "diverged"]
    for run in sweep_runs(Row("dense", "dense"), scale).values():
        results.add(run, made.swept(None))
    text = report(copy, "--no-figures")
    assert cells(rates(text), "dense") == ["diverged", "diverged"]
    assert cells(section(text, "Main"), "dense")[2:4] == ["", ""]  # no rate, no run


def test_what_is_missing_is_said(printed: str) -> None:
    text = section(printed, "Main")
    assert "1 of 9 runs are missing." in text
    assert "Mean ± standard deviation of 3 seeds." in text
    assert "## Later" not in printed
    lines = section(printed, "Lines")
    assert "One seed. Training FLOPs:" in lines and "±" not in lines
    assert "A note." in lines


def test_claims(printed: str) -> None:
    text = section(printed, "Main")
    flops = float(cells(text, "Avg-K")[1]) / float(cells(text, "dense")[1]) - 1
    rows, seeds = [0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2, 0, 1]
    design = np.hstack([np.eye(3)[rows], np.eye(3)[seeds][:, 1:]])
    _, rest, *_ = np.linalg.lstsq(design, np.log([100, 102, 107, 90, 92, 97, 95, 100]))
    error = np.sqrt(rest[0] / 3) * np.sqrt(2 / 3)
    lower = 1 - np.exp(np.log([90 / 100, 92 / 102, 97 / 107]).mean())
    assert (
        "- Avg-K beats dense. **Supported** at this scale: test perplexity 93.0 (Avg-K, 3 seeds) "
        f"against 103.0 (dense, 3 seeds), lower by {lower:.1%} ± {1 - np.exp(-error):.1%} ("
    ) in text
    assert f"at {flops:.1%} more FLOPs, where {1 - np.exp(-3.18245 * error):.1%} is sign" in text
    assert "- Avg-K beats Switch. **Undecided** at this scale: results are missing.\n" in text
    assert text.count("± is its standard error") == 1


def test_balance(printed: str) -> None:
    text = section(printed, "Balance")
    blocks = [10 * (i + 1) for i in range(127)], [10 * (i + 2) for i in range(127)]
    loads = [max(b) * 128 / sum(b) for b in blocks]
    assert cells(text, "Avg-K")[-3:-1] == [f"{sum(loads) / 2:.2f}", f"{127 / 128:.1%}"]
    assert 0.9 < float(cells(text, "Avg-K")[-1]) < 1
    assert cells(text, "dense")[-3:] == ["", "", ""]


def test_routing(printed: str) -> None:
    text = section(printed, "Routing")
    assert cells(text, "Switch")[0] == "1"
    assert cells(text, "Switch")[2:5] == ["93.8 ± 0.0%", "3.50 ± 0.00", "0.50 ± 0.00"]
    blocks = text[text.index("| model | layer | block |") :]
    assert cells(blocks.replace("\\|", "/"), "Switch")[1:] == ["14", "2.0", "`t14` `` a/b` ``"]


def test_zero_shot(printed: str) -> None:
    text = section(printed, "Zero")
    assert cells(text, "dense") == ["50.0 ± 2.0", "0.1 ± 1.0", "25.1"]
    assert cells(text, "Avg-K") == ["55.0 ± 2.0†", "0.1 ± 1.0", "27.6"]
    assert cells(text, "Switch") == ["", "", ""]
    assert cells(text, "random") == ["50.0", "0.1", "25.1"]
    assert (
        "† more than two standard errors of random guessing, sqrt(random (1 - random) / "
        "documents), from random: 1 of 4. All rows answer"
    ) in text
    assert "500 to 1,000 documents per task." in text
    assert "longer than the model's context are cut on the left: 1,234 of piqa. Longer" in text
    assert "Longer continuations are scored in pieces: 5 of piqa." in text
    assert "1 of 3 runs are missing." in text


def test_taxonomy(printed: str) -> None:
    text = section(printed, "Methods")
    small, large = text.split("**`_gpt3_medium`, 51,200 types, context 2,048**")
    assert cells(small, "Avg-K")[:2] == ["64", "8"]
    assert cells(large, "Avg-K") == [
        *("64", "64", "858,302,464", "354,740,224", "918.553", "+0.95%", "+0.95%"),
        "the blocks whose mean key fits best",
    ]
    assert cells(large, "dense")[:3] == ["", "", "354,740,224"]


def test_taxonomy_of_a_layer_plan(folder: Path, tmp_path: Path) -> None:
    """A cell lists the different values of the layers, in their order."""
    shutil.copytree(folder / "scales", tmp_path / "scales")
    plan = "--sffn-layers avgk/block_size=32:0,hash_layer:1,avgk/block_size=32:3"
    row = f'{{ label = "Mixed", model = "sffn", flags = "{plan}" }}'
    head = 'title = "Methods"\nkind = "taxonomy"\nseeds = []\n'
    (tmp_path / "methods.toml").write_text(f"{head}rows = [{row}]\n")
    small = section(report(tmp_path, "--no-figures"), "Methods").split("**`_gpt3")[0]
    found = cells(small, "Mixed")
    assert found[:2] == ["32; 512", "16; 1"]
    assert found[-1] == "the blocks whose mean key fits best; selects a block by token id"


def test_figures_are_drawn_alike_each_time(folder: Path, printed: str) -> None:
    figures = folder / "figures" / "small"
    names = ["balance", "flops", "gap", "lines", "main", "routing"]
    assert [path.stem for path in sorted(figures.iterdir())] == names
    first = {path.name: path.read_bytes() for path in figures.iterdir()}
    assert all(image.startswith(b"\x89PNG") for image in first.values())
    assert report(folder) == printed
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == first


def test_other_results_have_other_figures(folder: Path, printed: str, tmp_path: Path) -> None:
    """The figures of the default results do not change."""
    others = tmp_path / "others"
    shutil.copytree(folder / "results" / "small", others)
    figures = {path: path.read_bytes() for path in (folder / "figures" / "small").iterdir()}
    for path in figures:
        path.write_bytes(b"")
    text = report(folder, "--results", others)
    assert [path.read_bytes() for path in figures] == [b""] * len(figures)
    for path, image in figures.items():
        assert (others / "figures" / path.name).read_bytes() == image
        path.write_bytes(image)
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert {(folder / link).resolve().parent for link in links} == {others / "figures"}


def test_rows_with_other_sparse_layers(folder: Path, tmp_path: Path) -> None:
    """The figure shows each existing layer."""
    (tmp_path / "scales").mkdir()
    shutil.copy(folder / "scales" / "small.toml", tmp_path / "scales")
    rows = '{ label = "Avg-K", model = "avgk" }, '
    rows += '{ label = "Switch", model = "switch", flags = "--sffn-layers switch:0,switch:2" }'
    head = 'title = "R"\nkind = "routing"\nfigure = "routing"\n'
    table = tmp_path / "r.toml"
    table.write_text(f"{head}rows = [{rows}]\n")
    results = Results(tmp_path / "results" / "small", load_scale(folder / "scales" / "small.toml"))

    def other_layers(row: Row, run: Run) -> Any:
        found = made.result(100.0, BLOCKS[run.model], run.seed)
        layer = next(iter(found["routing"].values()))
        found["routing"] = {"0": layer, "2": layer} if run.model == "switch" else {"1": layer}
        return found

    made.fill(results, load_table(table).rows, other_layers)
    text = report(tmp_path)
    assert re.findall(r"^\| (\S+) \| (\d) \|", text, re.M)[:3] == [
        *(("Avg-K", "1"), ("Switch", "0"), ("Switch", "2")),
    ]
    assert (tmp_path / "figures" / "small" / "r.png").stat().st_size > 1000


def test_blocks_sharded_in_training_are_no_matter(folder: Path, tmp_path: Path) -> None:
    """Costs belong to the whole model."""
    shutil.copytree(folder / "scales", tmp_path / "scales")
    row, flags = 'model = "avgk"', 'model = "avgk", flags = "--sffn-expert-parallel 8"'
    (tmp_path / "methods.toml").write_text(TABLES["methods"].replace(row, flags))
    here, there = (section(report(f, "--no-figures"), "Methods") for f in (folder, tmp_path))
    assert cells(there, "Avg-K") == cells(here, "Avg-K")


@pytest.mark.parametrize("flags", [[], ["--no-figures"]])
def test_what_is_linked_is_what_is_drawn(flags: list[str], folder: Path, printed: str) -> None:
    """With nothing to compare, or without layers, nothing is drawn, even if all rows are done."""
    drawn = {path.name for path in (folder / "figures" / "small").iterdir()}
    text = report(folder, *flags)
    assert {Path(link).name for link in re.findall(r"!\[.*\]\((.*)\)", text)} == drawn
    assert "1 of 2 runs are missing." in section(text, "Gap of one")
    assert "\n\n\n" not in text


def test_json(folder: Path) -> None:
    found = json.loads(report(folder, "--json", "--no-figures"))
    assert "later" not in found["claims"]
    runs = {(r["table"], r["label"], r["stage"], r["seed"], r["lr"]): r for r in found["runs"]}
    assert not any(table == "later" for table, *_ in runs)
    run = runs["main", "dense", "row", 2, 0.002]
    assert (run["test"], run["out_of_domain"], run["done"]) == (102.0, 122.0, True)
    assert run["perplexity"] == {"valid": 50.0, "test": 102.0, "fiction": 112.0, "law": 132.0}
    assert runs["main", "dense", "sweep", 1, 0.001]["valid"] == 8.0
    assert runs["main", "Switch", "row", 3, 0.002]["test"] is None
    (piqa, _) = runs["zero", "dense", "row", 1, 0.002]["zero_shot"]["tasks"]
    assert piqa["accuracy_norm"] == 0.5
    claim = found["claims"]["main"][0]
    assert claim["word"] == "supported" and claim["p"] == claim["adjusted_p"] < 0.05
    expected = np.log([100 / 90, 102 / 92, 107 / 97]).mean()
    assert claim["difference"] == pytest.approx(expected)


PAGE = """before
<!-- report: main -->
<!-- end -->
<!-- report: main.domains -->
<!-- end -->
<!-- report: main.claims -->
<!-- end -->
<!-- report: main.figure -->
<!-- end -->
<!-- report: later -->
<!-- end -->
<!-- report: later.figure -->
<!-- end -->
<!-- report: alone.figure -->
<!-- end -->
after
"""


@pytest.fixture()
def page(folder: Path) -> Path:
    path = folder / "docs" / "page.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(PAGE)
    return path


def test_pages(folder: Path, page: Path) -> None:
    with pytest.raises(SystemExit, match=r"page\.md: differs"):
        report(folder, "--write", page, "--check")
    assert page.read_text() == PAGE
    report(folder, "--write", page, "--no-figures")
    text = page.read_text()
    assert "| dense |" in text and "**Supported**" in text and "| set | dense |" in text
    assert "![Main](../figures/small/main.png)" in text and text.count("![") == 1
    assert "1 of 1 runs are missing." in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "all blocks are" in report(folder, "--write", page, "--check")
    page.write_text(text.replace("103.0", "103.1", 1))
    with pytest.raises(SystemExit, match=r"page\.md: differs"):
        report(folder, "--write", page, "--check")
    assert "103.1" in page.read_text()


def test_line_ends_of_a_page_stay(folder: Path, page: Path) -> None:
    page.write_bytes(PAGE.replace("\n", "\r\n").encode())
    report(folder, "--write", page, "--no-figures")
    text = page.read_bytes()
    assert b"| dense |" in text and text.count(b"\n") == text.count(b"\r\n")
    assert "all blocks are" in report(folder, "--write", page, "--check")


def test_a_page_without_a_block(folder: Path, page: Path) -> None:
    page.write_text("<!--report: main-->\n")
    for flags in (["--check"], ["--no-figures"]):
        with pytest.raises(SystemExit, match=r"page\.md: has no block"):
            report(folder, "--write", page, *flags)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("report: main ", "report: nain ", r"page\.md: <!-- report: nain -->: nain: is none of"),
        ("main.domains", "main.x", r"main\.x: is none of .*main\.domains"),
        ("later.figure", "later.claims", r"later\.claims: is none of"),
        ("<!-- end -->\nafter", "after", r"page\.md:14: <!-- report: \S+ --> has no partner"),
    ],
)
def test_wrong_pages(old: str, new: str, error: str, folder: Path, page: Path) -> None:
    page.write_text(PAGE.replace(old, new))
    with pytest.raises(SystemExit, match=error) as stopped:
        report(folder, "--write", page)
    assert "\n" not in str(stopped.value)
    assert page.read_text() == PAGE.replace(old, new)


def test_a_diverged_training_is_said_and_not_averaged(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "copy")
    for name in TABLES:
        if name != "main":
            (other / f"{name}.toml").unlink()
    scale = load_scale(other / "scales" / "small.toml")
    results = Results(other / "results" / "small", scale)

    def diverge(row: Row, run: Run) -> Any:
        gone = (run.model, run.seed) == ("avgk", 2)
        return made.diverged() if gone else make(row, run)

    made.fill(results, load_table(other / "main.toml").rows, diverge)
    text = report(other)
    assert cells(text, "Avg-K")[3:6] == ["", "", ""]
    assert "Avg-K diverged (seed 2)." in text and "are missing" not in text
    assert "**Undecided** at this scale: Avg-K diverged." in text


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"perplexity"', '"x"', r"main\.toml: kind 'x': Input should be 'taxonomy'"),
        ("bars", "pie", r"main\.toml: figure 'pie': Input should be '', 'lines'"),
    ],
)
def test_wrong_tables(old: str, new: str, error: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "main.toml").write_text(TABLES["main"].replace(old, new))
    with pytest.raises(SystemExit, match=error):
        main(["report", str(tmp_path), "--scale", str(folder / "scales" / "small.toml")])


def test_versions_of_the_code_are_counted_by_table(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "copy")
    assert "versions of the code" not in report(other, "--no-figures")

    def with_version(row: Row, run: Run) -> Any:
        """Give each seed of Switch its own version."""
        found = make(row, run) | {"zero_shot": zero_shot(0.5, 0.0)}
        version = f"s{run.seed}" if run.model == "switch" else "c0"
        return found | {"versions": {"fairseq_sffn": version}}

    write_results(other, with_version)
    text = report(other, "--no-figures")
    said = {
        title: re.findall(r"Trained with (\d) versions of the code\.", section(text, title))
        for title in ("Main", "Balance", "Zero", "Routing", "Lines")
    }
    # The first table has them below the out-of-domain sets too. The sweep has one version.
    expected = {"Main": ["4", "4"], "Balance": [], "Zero": ["2"], "Routing": ["2"], "Lines": []}
    assert said == expected

    scale = load_scale(other / "scales" / "small.toml")
    results = Results(other / "results" / "small", scale)
    swept = next(iter(sweep_runs(Row("d", "dense"), scale).values()))
    results.add(swept, made.swept(3.0) | {"versions": {"fairseq_sffn": "c1"}})
    rates = section(report(other, "--no-figures"), "Balance").partition("| model | 0.001")[2]
    assert "Trained with 2 versions of the code." in rates
    for model in ("dense", "avgk"):  # other commits, the same code
        for run in sweep_runs(Row(model, model), scale).values():
            version = {"fairseq_sffn": f"{model}{run.lr}", "code": "f"}
            loss = 2.0 if run.lr == 0.002 else 3.0
            results.add(run, made.swept(loss) | {"versions": version})
    rates = section(report(other, "--no-figures"), "Balance").partition("| model | 0.001")[2]
    assert "**4.0**" in rates and "versions of the code" not in rates


@pytest.mark.parametrize("figure", ["lines", "flops", "load", "gap", "routing", "bars"])
def test_a_table_that_trains_nothing(figure: str, folder: Path, tmp_path: Path) -> None:
    changes = {"perplexity": "{kind}", "bars": figure, "[1, 2, 3]": "[]"}
    text = TABLES["main"].replace('"Avg-K", model', '"Avg-K", group = "a", x = 1, model')
    text = text.replace('"dense", model', '"dense", group = "dense", model')
    for old, new in changes.items():
        text = text.replace(old, new, 1)
    scale = str(folder / "scales" / "small.toml")
    out = io.StringIO()
    (tmp_path / "main.toml").write_text(text.replace("{kind}", "taxonomy"))
    with contextlib.redirect_stdout(out):
        main(["report", str(tmp_path), "--scale", scale])
    assert cells(out.getvalue(), "dense") and "![" not in out.getvalue()
    assert "dense. **Undecided** at this scale: results are missing." in out.getvalue()
    (tmp_path / "main.toml").write_text(text.replace("{kind}", "perplexity"))
    with pytest.raises(SystemExit, match=r"main\.toml: row 'dense': seeds: is empty"):
        main(["report", str(tmp_path), "--scale", scale])


def test_parts_without_rows_are_not_printed(folder: Path, tmp_path: Path) -> None:
    scale = (folder / "scales" / "small.toml").read_text().replace("[1e-3, 2e-3]", "[1e-3]")
    (tmp_path / "scales").mkdir()
    path = tmp_path / "scales" / "small.toml"
    path.write_text(scale)
    (tmp_path / "t.toml").write_text('title = "T"\nkind = "perplexity"' + ROWS)
    one = load_scale(path)
    results = Results(tmp_path / "results" / "small", one)

    def in_domain(row: Row, run: Run) -> Any:
        found = make(row, run)
        found["evaluation"] = {name: found["evaluation"][name] for name in ("valid", "test")}
        return found

    made.fill(results, load_table(tmp_path / "t.toml").rows, in_domain)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["report", str(tmp_path), "--scale", str(path)])
    assert out.getvalue().count("| --- |") == 1
    assert "| set |" not in out.getvalue() and "the chosen rate" not in out.getvalue()


def test_zero_shot_of_several_seeds(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    table = tmp_path / "copy" / "zero.toml"
    assert "The first seed of each row." not in section(report(table.parent), "Zero")
    table.write_text("seeds = [1, 2]\n" + table.read_text())
    assert "The first seed of each row." in section(report(table.parent), "Zero")


def test_times(folder: Path, tmp_path: Path) -> None:
    """The times are listed for each table and for all tables, whatever runs they share."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)

    def slow(row: Row, run: Run) -> Any:
        found = some_missing(row, run)
        return found and found | {"training": {**found["training"], "tokens_per_second": 0.1}}

    shutil.rmtree(copy / "results")
    write_results(copy, slow)
    page = tmp_path / "page.md"
    page.write_text("<!-- report: times -->\n<!-- end -->\n")
    report(copy, "--write", str(page), "--no-figures")
    text = page.read_text()
    # Each run has 40 updates of 8 times 16 tokens. Runs of sweeps took no time.
    hour = 40 * 8 * 16 / 0.1 / 3600
    assert cells(text, "main") == ["15", f"{8 * hour:.1f}"]  # one is missing, six belong to sweeps
    assert cells(text, "later") == ["3", "0.0"]
    assert cells(text, "gap") == ["6", f"{2 * hour:.1f}"]
    assert "methods" not in text
    assert float(cells(text, "all")[1]) == pytest.approx((8 + 1 + 2) * hour, abs=0.05)


def test_wrong_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--check: needs --write"):
        report(folder, "--check")
    with pytest.raises(SystemExit, match=r"--results .*none: there is no such folder"):
        report(folder, "--results", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"has no \*\.toml"):
        main(["report", str(tmp_path), "--scale", str(folder / "scales" / "small.toml")])
    with pytest.raises(SystemExit, match=r"x\.toml: cannot be read"):
        main(["report", str(folder), "--scale", str(tmp_path / "x.toml")])
