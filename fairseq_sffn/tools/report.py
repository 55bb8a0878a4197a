"""Renders a study's tables, figures and claims from its results."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import UsageError
from ..study import claims
from ..study.files import load_scale, load_table
from ..study.outcomes import SHOWN, Study
from ..study.pages import fill, read
from ..study.plan import Table
from ..study.results import Results
from ..study.tables import KINDS
from ..study.tables.part import Parts, render
from ..study.tables.times import times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("study", type=Path, help="folder of TOML files, one a table")
    parser.add_argument("--scale", type=Path, required=True, help="TOML file of the scale")
    parser.add_argument(
        "--tables",
        nargs="+",
        metavar="TABLE",
        help="print and draw these alone; deviations are still of all (default: all)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of the JSON files, which gets figures too (default: STUDY/results/SCALE, and "
        "STUDY/figures/SCALE for figures)",
    )
    parser.add_argument(
        "--write",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.md",
        help="files in which what stands between the lines '<!-- report: BLOCK -->' and "
        "'<!-- end -->' is replaced; BLOCK is TABLE, or TABLE.PART, where parts are claims, "
        "figure and what the table's kind has besides, such as domains; times is how long it took",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing, and fail where --write would change a file",
    )
    parser.add_argument("--no-figures", action="store_true", help="leave the PNG files as they are")
    parser.add_argument("--json", action="store_true", help="print JSON")


@dataclass
class Report:
    """What a study's results are rendered as.

    Attributes:
        study: of the results.
        folder: of the study.
        figures: folder for PNG files.
        parts: name of a table -> its parts.
        done: names of the tables that have results, or need none.
        verdicts: name of a table -> the verdicts on its claims.
        only: names of the tables that are printed and drawn; empty: all.
    """

    study: Study
    folder: Path
    figures: Path
    parts: dict[str, Parts] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    verdicts: dict[str, list[claims.Verdict]] = field(default_factory=dict)
    only: frozenset[str] = frozenset()

    def figure(self, table: Table) -> Path | None:
        """The file of a table's figure; ``None``: it has none, or nothing to show yet."""
        if not table.figure or not SHOWN[table.figure](self.study, table):
            return None
        return self.figures / f"{table.name}.png"

    def markdown(self, table: Table, part: str, beside: Path) -> str:
        """A part of a table.

        Args:
            table: of the study.
            part: ``""``, the table itself, ``claims``, ``figure``, or another one that it has.
            beside: folder of the document, from which links go.

        Raises:
            UsageError: it has no such part.
        """
        parts = self.parts[table.name]
        known = {*parts, *(["claims"] if table.claims else []), *(["figure"] * bool(table.figure))}
        if part not in known:
            names = ", ".join(".".join(filter(None, [table.name, name])) for name in sorted(known))
            raise UsageError(f"{table.name}.{part}: is none of {names}")
        if part == "claims":
            return claims.markdown(self.verdicts[table.name], claims.seed_deviation(self.study))
        if part == "figure":
            figure = self.figure(table)
            if figure is None:
                return ""
            return f"![{table.title}]({Path(os.path.relpath(figure, beside)).as_posix()})"
        return render(parts[part])

    def block(self, name: str, beside: Path) -> str:
        """What belongs into a block of a document.

        Raises:
            UsageError: there is no such table or part.
        """
        table, _, part = name.partition(".")
        if table not in self.study.tables:
            if name == "times":
                return times(self.study).markdown()
            raise UsageError(f"{table}: is none of {', '.join(self.study.tables)}, times")
        return self.markdown(self.study.tables[table], part, beside)

    def text(self) -> str:
        """All tables that are printed."""
        texts = []
        for table in self.tables():
            texts.append(f"## {table.title}")
            also = [*(["figure"] * bool(table.figure)), *(["claims"] * bool(table.claims))]
            filled = [
                name for name, parts in self.parts[table.name].items() if any(p.rows for p in parts)
            ]
            names = [*filled, *also]
            texts += filter(None, (self.markdown(table, part, self.folder) for part in names))
        return "\n\n".join(texts)

    def json(self) -> str:
        """All figures that the tables show."""
        found = {
            table.name: {
                "parts": {
                    name: [{"title": p.title, "rows": p.rows, "notes": p.notes} for p in parts]
                    for name, parts in self.parts[table.name].items()
                },
                "claims": self.verdicts[table.name],
            }
            for table in self.tables()
        }
        return json.dumps(found, default=asdict, ensure_ascii=False)

    def tables(self) -> list[Table]:
        """Those that are printed and have results."""
        asked = self.only or self.study.tables.keys()
        return [t for name, t in self.study.tables.items() if name in self.done and name in asked]


def run(args: argparse.Namespace) -> str:
    """Renders what there are results of.

    Raises:
        UsageError: a file is wrong, or with ``--check`` not what the results give.
    """
    if args.check and not args.write:
        raise UsageError("--check: needs --write FILE.md")
    report = make(args.study, args.scale, args.results)
    report.only = frozenset(args.tables or ())
    if unknown := sorted(report.only - report.study.tables.keys()):
        raise UsageError(f"--tables {unknown[0]}: is none of {', '.join(report.study.tables)}")
    changed = {}
    for path in args.write:
        text = filled(report, path)
        if text != read(path):
            changed[path] = text
    if args.check:
        if changed:
            names = ", ".join(map(str, changed))
            raise UsageError(f"{names}: differs from what the results give; run without --check")
        return "all blocks are what the results give"
    if not args.no_figures:
        draw(report)
    for path, text in changed.items():
        path.write_bytes(text.encode())
    return report.json() if args.json else report.text()


def make(folder: Path, scale_path: Path, results: Path | None) -> Report:
    """The report of a study.

    Raises:
        UsageError: a file is wrong.
    """
    scale = load_scale(scale_path)
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise UsageError(f"{folder}: has no *.toml")
    tables = {path.stem: load_table(path) for path in paths}
    if results and not results.is_dir():
        raise UsageError(f"--results {results}: there is no such folder")
    found = Results(results or folder / "results" / scale.name, scale)
    figures = results / "figures" if results else folder / "figures" / scale.name
    report = Report(Study(scale, found, tables), folder, figures)
    for table in tables.values():
        outcomes = report.study.outcomes(table)
        if any(o.results for o in outcomes) or not any(o.cells for o in outcomes):
            report.done.add(table.name)
        report.parts[table.name] = KINDS[table.kind](report.study, table)
        report.verdicts[table.name] = claims.verdicts(report.study, table)
    return report


def filled(report: Report, path: Path) -> str:
    """A document as the results make it.

    Raises:
        UsageError: it cannot be read, or has no block, or one that is none.
    """

    def block(name: str) -> str:
        try:
            return report.block(name, path.parent)
        except UsageError as error:
            raise UsageError(f"{path}: <!-- report: {name} -->: {error}") from error

    return fill(path, block)


def draw(report: Report) -> None:
    """Writes the figures.

    Raises:
        UsageError: there is no matplotlib.
    """
    drawn = [(table, path) for table in report.tables() if (path := report.figure(table))]
    if not drawn:
        return
    try:
        from ..study.figures import FIGURES, png
    except ImportError as error:
        raise UsageError(
            "figures need matplotlib: pip install 'fairseq-sffn[plots]', or --no-figures"
        ) from error
    for table, path in drawn:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(FIGURES[table.figure](report.study, table)))
