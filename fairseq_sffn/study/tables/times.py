"""How long a study takes."""

from __future__ import annotations

from collections.abc import Iterable

from ..outcomes import Study
from ..plan import Cell, sweep_cells
from .part import Part, Show, Value, text, whole


def times(study: Study) -> Part:
    """Trainings of each table, and how long they took."""
    columns: dict[str, Show] = {"table": text, "trainings": whole, "hours": "{:.1f}".format}
    by_table = {
        name: {
            *(cell for o in study.outcomes(table) for cell in o.cells),
            *(cell for row in table.rows for cell in sweep_cells(row, study.scale)),
        }
        for name, table in study.tables.items()
    }
    by_table = {name: cells for name, cells in by_table.items() if cells}
    by_table["all"] = set().union(*by_table.values())
    rows: list[dict[str, Value]] = [
        {"table": name, "trainings": len(cells), "hours": hours(study, cells)}
        for name, cells in by_table.items()
    ]
    note = (
        "Hours of one training after another, at the speed that each had, without evaluation; of "
        "those that are done. Trainings that tables have in common count in each, as do those that "
        "choose learning rates."
    )
    return Part(columns, rows, [note])


def hours(study: Study, cells: Iterable[Cell]) -> float:
    """Of all that are done."""
    seconds = 0.0
    for cell in cells:
        if result := study.results.get(cell):
            seconds += cell.tokens(study.scale) / (result["training"]["tokens_per_second"] or 1e9)
    return seconds / 3600
