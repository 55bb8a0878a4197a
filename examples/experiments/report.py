"""Renders tables, figures and verdicts from results."""

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fairseq_sffn.errors import UsageError

from . import claims, figures
from .files import Table, load_scale, load_table
from .frame import Experiments
from .results import Results
from .tables.perplexity import balance, perplexities, times
from .tables.routing import routing
from .tables.taxonomy import taxonomy
from .tables.zero_shot import zero_shot

KINDS = {
    **{"taxonomy": taxonomy, "perplexity": perplexities, "balance": balance},
    **{"routing": routing, "zero_shot": zero_shot},
}
"""Kind of a table -> the function that makes its parts."""

MARKER = re.compile(r"^<!-- (report: \S+|end) -->\r?$", re.M)
BLOCK = re.compile(
    r"^(?P<start><!-- report: (?P<name>\S+) -->(?P<line_end>\r?\n))"
    r"(?:(?!<!-- report: ).*\n)*?(?P<end><!-- end -->\r?)$",
    re.M,
)
"""Lines around a block in a document, and a block: it has no other block inside."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("folder", type=Path, help="folder of TOML files, one a table")
    add("--scale", type=Path, required=True, help="TOML file of the scale")
    add("--tables", nargs="+", metavar="TABLE", help="print and draw only these (default: all)")
    add("--results", type=Path, help="folder of JSON files and figures (default: see README.md)")
    blocks = "TABLE, TABLE.PART or times; parts are claims, figure and those of the table's kind"
    between = "'<!-- report: BLOCK -->' and '<!-- end -->'"
    write = f"files in which the text between the lines {between} is replaced; BLOCK is {blocks}"
    add("--write", type=Path, nargs="+", default=[], metavar="FILE.md", help=write)
    add("--check", action="store_true", help="change nothing; fail if --write would change a file")
    add("--no-figures", action="store_true", help="leave the PNG files as they are")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> str:
    """Render the results that there are."""
    if args.check and not args.write:
        raise UsageError("--check: needs --write FILE.md")
    scale = load_scale(args.scale)
    tables = {path.stem: load_table(path) for path in sorted(args.folder.glob("*.toml"))}
    if not tables:
        raise UsageError(f"{args.folder}: has no *.toml")
    if unknown := sorted({*(args.tables or ())} - tables.keys()):
        raise UsageError(f"--tables {unknown[0]}: is none of {', '.join(tables)}")
    if args.results and not args.results.is_dir():
        raise UsageError(f"--results {args.results}: there is no such folder")
    results = Results(args.results or args.folder / "results" / scale.name, scale)
    folder = args.results / "figures" if args.results else args.folder / "figures" / scale.name
    report = Report(Experiments(scale, results, tables), folder)
    shown = [tables[name] for name in args.tables or tables if report.has_results(tables[name])]

    filled = {path: fill(path, report.block) for path in args.write}
    changed = {path: text for path, text in filled.items() if text != read(path)}
    if args.check and changed:
        names = ", ".join(map(str, changed))
        raise UsageError(f"{names}: differs from what the results give; run without --check")
    if args.check:
        return "all blocks are what the results give"
    if not args.no_figures:
        report.draw(shown)
    for path, text in changed.items():
        path.write_bytes(text.encode())
    return report.json(shown) if args.json else report.text(shown, args.folder)


class Report:
    """The rendered results.

    Args:
        experiments: tables and results.
        folder: folder of the PNG files.

    Attributes:
        blocks: name of a block -> its text; links start with ``folder``.
    """

    def __init__(self, experiments: Experiments, folder: Path) -> None:
        self.experiments, self.folder = experiments, folder
        self.blocks = {"times": times(experiments).markdown()}
        self.verdicts = claims.verdicts(experiments)
        deviation = claims.seed_deviation(experiments.frame)
        self.figures = {}
        for name, table in experiments.tables.items():
            for part, found in KINDS[table.kind](experiments, table).items():
                texts = [one.markdown() for one in found]
                self.blocks[f"{name}.{part}".removesuffix(".")] = "\n\n".join(texts)
            if table.figure:
                self.figures[name] = figures.draw(experiments, table)
                link = f"![{table.title}]({folder.as_posix()}/{name}.png)"
                self.blocks[f"{name}.figure"] = link if self.figures[name] else ""
            if table.claims:
                text = claims.markdown(self.verdicts[name], deviation, table.margin)
                self.blocks[f"{name}.claims"] = text

    def has_results(self, table: Table) -> bool:
        """Return whether a run of a table is done, or whether there is nothing to run."""
        runs = self.experiments.runs(table)
        return runs.empty or bool(runs.done.any())

    def block(self, name: str, beside: Path) -> str:
        """Return the text of a block, for a document in a folder."""
        if name not in self.blocks:
            raise UsageError(f"{name}: is none of {', '.join(self.blocks)}")
        link = Path(os.path.relpath(self.folder, beside)).as_posix()
        return self.blocks[name].replace(f"]({self.folder.as_posix()}/", f"]({link}/")

    def text(self, tables: list[Table], beside: Path) -> str:
        """Return all blocks of some tables."""
        texts = []
        for table in tables:
            names = [name for name in self.blocks if name.partition(".")[0] == table.name]
            texts += [f"## {table.title}", *(self.block(name, beside) for name in names)]
        return "\n\n".join(filter(None, texts))

    def json(self, tables: list[Table]) -> str:
        """Return the settings and values of all runs of some tables, and the verdicts."""
        frame = self.experiments.frame
        runs = frame[frame.table.isin([table.name for table in tables])]
        runs = runs.assign(zero_shot=[result.get("zero_shot") for result in runs.result])
        lines = runs.drop(columns=["run", "model", "result"]).to_json(orient="records")
        verdicts = {table.name: self.verdicts[table.name] for table in tables}
        return json.dumps({"runs": json.loads(lines), "claims": verdicts}, default=asdict)

    def draw(self, tables: list[Table]) -> None:
        """Write the figures of some tables."""
        for name in (table.name for table in tables):
            if figure := self.figures.get(name):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{name}.png").write_bytes(figures.png(figure))


def read(path: Path) -> str:
    """Read a document without changing its line ends."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def fill(path: Path, block: Callable[[str, Path], str]) -> str:
    """Return a document with filled blocks, from ``<!-- report: BLOCK -->`` to ``<!-- end -->``.

    Args:
        path: file of the document.
        block: function from the name of a block, and the document's folder, to its text.
    """
    page = read(path)

    def filled(found: re.Match[str]) -> str:
        try:
            text = block(found["name"], path.parent)
        except UsageError as error:
            raise UsageError(f"{path}: <!-- report: {found['name']} -->: {error}") from error
        inside = f"\n{text}\n\n" if text else "\n"
        return found["start"] + inside.replace("\n", found["line_end"]) + found["end"]

    for marker in MARKER.finditer(BLOCK.sub(lambda found: " " * len(found[0]), page)):
        line = page.count("\n", 0, marker.start()) + 1
        raise UsageError(f"{path}:{line}: {marker[0].strip()} has no partner")
    if not BLOCK.search(page):
        raise UsageError(f"{path}: has no block <!-- report: BLOCK -->")
    return BLOCK.sub(filled, page)
