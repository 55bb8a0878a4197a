"""Renders tables, figures and verdicts from results."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fairseq_sffn.errors import UsageError

from . import claims
from .figures import FIGURES, png
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
    add(
        "--tables",
        nargs="+",
        metavar="TABLE",
        default=[],
        help="print and draw only these; deviations are still computed from all (default: all)",
    )
    add(
        "--results",
        type=Path,
        help="folder of the JSON files, and of the figures then (default: FOLDER/results/SCALE, "
        "and FOLDER/figures/SCALE for figures)",
    )
    add(
        "--write",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.md",
        help="files in which the text between the lines '<!-- report: BLOCK -->' and "
        "'<!-- end -->' is replaced; BLOCK is TABLE, TABLE.PART or times; parts are claims, "
        "figure and others that depend on the table's kind, such as domains",
    )
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
    if unknown := sorted({*args.tables} - tables.keys()):
        raise UsageError(f"--tables {unknown[0]}: is none of {', '.join(tables)}")
    if args.results and not args.results.is_dir():
        raise UsageError(f"--results {args.results}: there is no such folder")
    results = Results(args.results or args.folder / "results" / scale.name, scale)
    figures = args.results / "figures" if args.results else args.folder / "figures" / scale.name
    report = Report(Experiments(scale, results, tables), figures)
    shown = [table for name, table in tables.items() if not args.tables or name in args.tables]
    shown = [table for table in shown if report.has_results(table)]

    filled = {path: fill(path, report.block) for path in args.write}
    changed = {path: text for path, text in filled.items() if text != read(path)}
    if args.check:
        if changed:
            names = ", ".join(map(str, changed))
            raise UsageError(f"{names}: differs from what the results give; run without --check")
        return "all blocks are what the results give"
    if not args.no_figures:
        report.draw(shown)
    for path, text in changed.items():
        path.write_bytes(text.encode())
    if args.json:
        return report.json(shown)
    return "\n\n".join(report.text(table, args.folder) for table in shown)


class Report:
    """The rendered results.

    Args:
        experiments: tables and results.
        folder: folder of the PNG files.
    """

    def __init__(self, experiments: Experiments, folder: Path) -> None:
        self.experiments, self.folder, self.tables = experiments, folder, experiments.tables
        self.deviation = claims.seed_deviation(experiments.frame)
        self.parts, self.verdicts, self.figures = {}, {}, {}
        for name, table in self.tables.items():
            self.parts[name] = KINDS[table.kind](experiments, table)
            self.verdicts[name] = claims.verdicts(experiments, table)
            if table.figure and (figure := FIGURES[table.figure](experiments, table)):
                self.figures[name] = figure

    def has_results(self, table: Table) -> bool:
        """Return whether a run of a table is done, or whether there is nothing to run."""
        runs = self.experiments.runs(table)
        return runs.empty or bool(runs.done.any())

    def names(self, table: Table) -> list[str]:
        """Return the names of a table's parts."""
        also = {"figure": table.figure, "claims": table.claims}
        return [*self.parts[table.name], *(name for name, has in also.items() if has)]

    def markdown(self, table: Table, part: str, beside: Path) -> str:
        """Return a part of a table.

        Args:
            table: the table.
            part: one of its :meth:`names`.
            beside: folder of the document, from which links start.
        """
        if part == "claims":
            return claims.markdown(self.verdicts[table.name], self.deviation, table.margin)
        if part == "figure":
            link = Path(os.path.relpath(self.folder / f"{table.name}.png", beside)).as_posix()
            return f"![{table.title}]({link})" if table.name in self.figures else ""
        return "\n\n".join(one.markdown() for one in self.parts[table.name][part])

    def block(self, name: str, beside: Path) -> str:
        """Return the text of a block in a document of a folder."""
        table, _, part = name.partition(".")
        if name == "times":
            return times(self.experiments).markdown()
        if table not in self.tables:
            raise UsageError(f"{table}: is none of {', '.join(self.tables)}, times")
        if part not in (names := self.names(self.tables[table])):
            known = (f"{table}.{one}".removesuffix(".") for one in sorted(names))
            raise UsageError(f"{name}: is none of {', '.join(known)}")
        return self.markdown(self.tables[table], part, beside)

    def text(self, table: Table, beside: Path) -> str:
        """Return all parts of a table, without those that have no rows."""
        parts = self.parts[table.name]
        filled = [
            self.markdown(table, name, beside)
            for name in self.names(table)
            if name not in parts or any(len(part.cells) for part in parts[name])
        ]
        return "\n\n".join(filter(None, [f"## {table.title}", *filled]))

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
        for table in tables:
            if table.name in self.figures:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{table.name}.png").write_bytes(png(self.figures[table.name]))


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
