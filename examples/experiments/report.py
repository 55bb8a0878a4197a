"""Renders tables, figures and verdicts from results."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fairseq_sffn.errors import UsageError

from . import claims, pages
from .files import Table, load_scale, load_table
from .outcomes import Experiments
from .points import POINTS
from .results import Results
from .tables import KINDS
from .tables.part import Parts
from .tables.perplexity import times


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


@dataclass
class Report:
    """The rendered results.

    Attributes:
        experiments: tables and results.
        folder: folder of the tables.
        figures: folder of the PNG files.
        parts: name of a table -> its parts.
        verdicts: name of a table -> verdicts on its claims.
        shown: tables that are printed and drawn.
    """

    experiments: Experiments
    folder: Path
    figures: Path
    parts: dict[str, Parts] = field(default_factory=dict)
    verdicts: dict[str, list[claims.Verdict]] = field(default_factory=dict)
    shown: list[Table] = field(default_factory=list)

    def figure(self, table: Table) -> Path | None:
        """Return the file of a table's figure; ``None`` where there is nothing to draw."""
        if not table.figure or not POINTS[table.figure](self.experiments, table):
            return None
        return self.figures / f"{table.name}.png"

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
        if part not in self.names(table):
            known = (f"{table.name}.{name}".removesuffix(".") for name in self.names(table))
            raise UsageError(f"{table.name}.{part}: is none of {', '.join(sorted(known))}")
        if part == "claims":
            deviation = claims.seed_deviation(self.experiments)
            return claims.markdown(self.verdicts[table.name], deviation, table.margin)
        if part == "figure":
            figure = self.figure(table)
            link = Path(os.path.relpath(figure, beside)).as_posix() if figure else ""
            return f"![{table.title}]({link})" if figure else ""
        return "\n\n".join(one.markdown() for one in self.parts[table.name][part])

    def filled(self, path: Path) -> str:
        """Return a document with its blocks filled."""

        def block(name: str) -> str:
            table, _, part = name.partition(".")
            tables = self.experiments.tables
            try:
                if table in tables:
                    return self.markdown(tables[table], part, path.parent)
                if name == "times":
                    return times(self.experiments).markdown()
                raise UsageError(f"{table}: is none of {', '.join(tables)}, times")
            except UsageError as error:
                raise UsageError(f"{path}: <!-- report: {name} -->: {error}") from error

        return pages.fill(path, block)

    def text(self) -> str:
        """Return all tables that are printed, without parts that have no rows."""
        texts = []
        for table in self.shown:
            parts = self.parts[table.name]
            texts.append(f"## {table.title}")
            texts += [
                self.markdown(table, name, self.folder)
                for name in self.names(table)
                if name not in parts or any(part.rows for part in parts[name])
            ]
        return "\n\n".join(filter(None, texts))

    def json(self) -> str:
        """Return all values of the tables that are printed."""
        found = {
            table.name: {
                "parts": {
                    name: [{"title": p.title, "rows": p.rows, "notes": p.notes} for p in parts]
                    for name, parts in self.parts[table.name].items()
                },
                "claims": self.verdicts[table.name],
            }
            for table in self.shown
        }
        return json.dumps(found, default=asdict, ensure_ascii=False)

    def draw(self) -> None:
        """Write the figures."""
        drawn = [(table, path) for table in self.shown if (path := self.figure(table))]
        if not drawn:
            return
        try:
            from .figures import FIGURES, png
        except ImportError as error:
            raise UsageError(
                "figures need matplotlib: pip install 'fairseq-sffn[plots]', or --no-figures"
            ) from error
        for table, path in drawn:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(FIGURES[table.figure](self.experiments, table)))


def run(args: argparse.Namespace) -> str:
    """Render the results that there are."""
    if args.check and not args.write:
        raise UsageError("--check: needs --write FILE.md")
    report = make(args.folder, args.scale, args.results, args.tables)
    filled = {path: report.filled(path) for path in args.write}
    changed = {path: text for path, text in filled.items() if text != pages.read(path)}
    if args.check:
        if changed:
            names = ", ".join(map(str, changed))
            raise UsageError(f"{names}: differs from what the results give; run without --check")
        return "all blocks are what the results give"
    if not args.no_figures:
        report.draw()
    for path, text in changed.items():
        path.write_bytes(text.encode())
    return report.json() if args.json else report.text()


def make(folder: Path, scale_path: Path, results: Path | None, only: list[str]) -> Report:
    """Read tables and results, and render all tables.

    Args:
        folder: folder of the tables.
        scale_path: file of the scale.
        results: folder of the results; ``None``: the default.
        only: names of the tables that are printed; empty: all.
    """
    scale = load_scale(scale_path)
    tables = {path.stem: load_table(path) for path in sorted(folder.glob("*.toml"))}
    if not tables:
        raise UsageError(f"{folder}: has no *.toml")
    if unknown := sorted({*only} - tables.keys()):
        raise UsageError(f"--tables {unknown[0]}: is none of {', '.join(tables)}")
    if results and not results.is_dir():
        raise UsageError(f"--results {results}: there is no such folder")
    found = Results(results or folder / "results" / scale.name, scale)
    figures = results / "figures" if results else folder / "figures" / scale.name
    report = Report(Experiments(scale, found, tables), folder, figures)
    for table in tables.values():
        outcomes = report.experiments.outcomes(table)
        done = any(o.results for o in outcomes) or not any(o.runs for o in outcomes)
        if done and (not only or table.name in only):
            report.shown.append(table)
        report.parts[table.name] = KINDS[table.kind](report.experiments, table)
        report.verdicts[table.name] = claims.verdicts(report.experiments, table)
    return report
