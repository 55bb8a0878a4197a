"""What came out of a training: a JSON file each."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from ..errors import UsageError
from .plan import Cell, Row, Scale, sweep_cells

RECORD = re.compile(r".*\| INFO \| (train_inner|valid|train) \| (\{.*\})$")
"""A line of fairseq-train's log with ``--log-format json``, or what ends a line that a training
began before it was killed."""


def log_records(path: Path) -> list[tuple[str, dict[str, float]]]:
    """The records of a log: ``train_inner`` or ``valid``, and what was logged. Where a training was
    resumed, what it did twice is there once, as it was the second time."""
    records: dict[tuple[str, float], tuple[str, dict[str, float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = RECORD.match(line.rstrip())
        if match is None or match[1] == "train":
            continue
        try:
            logged = json.loads(match[2])
        except json.JSONDecodeError:  # of two processes, run together
            continue
        values = {name: _number(value) for name, value in logged.items()}
        prefix = "valid_" if match[1] == "valid" else ""
        record = {name.removeprefix(prefix): value for name, value in values.items()}
        records[match[1], record["num_updates"]] = (match[1], record)
    return sorted(records.values(), key=lambda item: (item[1]["num_updates"], item[0]))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


ROUTING = ("load_max", "load_entropy", "unused_blocks", "load_kl", "dropped_share", "balance_loss")
"""What is kept of a log beside losses, where it is there."""


def curve(path: Path) -> dict[str, Any]:
    """How a training went.

    Returns:
        ``train`` and ``valid``: a list each of update, loss (base 2), and the routing of blocks;
        ``tokens_per_second``: of updates, validation excluded.
    """
    lists: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
    words = seconds = 0.0
    validated = False
    for kind, record in log_records(path):
        kept = {"update": record["num_updates"], "loss": record["loss"]}
        kept |= {name: record[name] for name in ROUTING if name in record}
        lists["valid" if kind == "valid" else "train"].append(kept)
        if kind == "valid":
            validated = True
        elif kind == "train_inner":
            # fairseq's clock goes on in validation, as the next record of training shows.
            if record.get("wps") and not validated:
                words, seconds = words + record["wpb"], seconds + record["wpb"] / record["wps"]
            validated = False
    speed = words / seconds if seconds else 0.0
    return {**lists, "tokens_per_second": round(speed, 1)}


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_json(result) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _json(value: Any, depth: int = 0) -> str:
    """Readable JSON: lists on a line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    indent = " " * (depth + 1)
    items = [
        f"{indent}{json.dumps(name)}: {_json(item, depth + 1)}" for name, item in value.items()
    ]
    return "{\n" + ",\n".join(items) + "\n" + " " * depth + "}"


IN_DOMAIN = ("valid", "test")
"""The sets of an evaluation that are of the training's text."""

WHOLE = "routing"
"""The part of a result that those of a sweep are without."""

NUMBER = (int, float)
OR_NONE = (*NUMBER, NoneType)
OTHERS = "*"
"""Stands for the names of an object that its shape does not have."""

RESULT = {
    "data": str,
    "machine": str,
    "versions": {"fairseq_sffn": str},
    "training": {"train": [{"update": NUMBER, OTHERS: NUMBER}], "tokens_per_second": NUMBER},
    "evaluation": {"valid": {"loss": OR_NONE}},
}
"""What is read of a result: a type or several, a list of one shape, or an object with shapes by
name."""
EVALUATION = {name: {"perplexity": NUMBER} for name in ("valid", "test", OTHERS)}
LAYER = {
    **{"counts": [int], "block_bits": NUMBER, "token_bits": OR_NONE},
    **{"top_tokens": [[str]], "blocks": [[int]], "positions": [int]},
}
TASK = {
    **{"task": str, "documents": int, "random": NUMBER, "accuracy": NUMBER},
    **{"standard_error": OR_NONE, "accuracy_norm": OR_NONE, "standard_error_norm": OR_NONE},
}
PARTS = {
    WHOLE: {"evaluation": EVALUATION, WHOLE: {OTHERS: LAYER}},
    "zero_shot": {"evaluation": EVALUATION, "zero_shot": {"tasks": [TASK]}},
}
"""What is read besides where a result has that part, unless the training diverged."""
KINDS = {str: "a text", int: "a whole number", NUMBER: "a number", OR_NONE: "a number or null"}


def read(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        UsageError: it cannot be read, or has not what is read of a result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        check(result, RESULT)
        for part, shape in PARTS.items():
            if part in result and math.isfinite(valid_loss(result)):
                check(result, shape)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is no result: {error}") from error
    return result


def check(value: Any, shape: Any, where: str = "") -> None:
    """Compares a value with a shape as above.

    Raises:
        ValueError: it has another one.
    """
    if isinstance(shape, dict):
        expect(value, dict, "an object", where)
        for name in shape:
            if name not in value and name != OTHERS:
                raise ValueError(f"{where}{name}: is missing")
        for name in value.keys() if OTHERS in shape else shape.keys():
            check(value[name], shape.get(name, shape.get(OTHERS)), f"{where}{name}.")
    elif isinstance(shape, list):
        expect(value, list, "a list", where)
        for item in value:
            check(item, shape[0], where)
    else:
        expect(value, shape, KINDS[shape], where)


def expect(value: Any, kind: Any, name: str, where: str) -> None:
    """Raises a ``ValueError`` if a value is not of a type."""
    if not isinstance(value, kind):
        raise ValueError(": ".join(filter(None, [where.removesuffix("."), f"must be {name}"])))


class Results:
    """The results in a folder, by the key of their cell.

    Args:
        folder: of JSON files.
        scale: that they are of.
        data: fingerprint of the text; ``None``: whatever they were made with.

    Raises:
        UsageError: a file is no result, or results of another text are there.
    """

    def __init__(self, folder: Path, scale: Scale, data: str | None = None) -> None:
        self.folder, self.scale = folder, scale
        self.by_key: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.json")):
            self.by_key[path.stem] = read(path)
        texts = {result["data"] for result in self.by_key.values()}
        if data is not None and texts - {data}:
            others = ", ".join(sorted(texts - {data}))
            raise UsageError(
                f"{folder}: has results of the text {others}, and this is {data}; keep those of "
                "this text in another folder, with --results"
            )
        if len(texts) > 1:
            raise UsageError(f"{folder}: has results of several texts: {', '.join(sorted(texts))}")

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell, if it is there."""
        return self.by_key.get(cell.key(self.scale))

    def refresh(self, cell: Cell) -> None:
        """Takes note of a result that another run has written since."""
        if (path := self.path(cell)).exists():
            self.by_key[path.stem] = read(path)

    def path(self, cell: Cell) -> Path:
        """The file of a cell's result."""
        return self.folder / f"{cell.key(self.scale)}.json"

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keeps a result."""
        self.by_key[cell.key(self.scale)] = result
        write(self.path(cell), result)

    def learning_rate(self, row: Row) -> float | None:
        """The learning rate of a row: the one of the sweep with the lowest loss on the validation
        split; ``None``: the sweep is not done, or all of it diverged."""
        if row.lr is not None:
            return row.lr
        cells = sweep_cells(row, self.scale)
        if not cells:  # one rate, or a row that is not trained
            return self.scale.learning_rates[0]
        found = [self.get(cell) for cell in cells]
        if not all(found):
            return None
        loss, lr = min(
            (valid_loss(result), cell.lr) for result, cell in zip(found, cells, strict=True)
        )
        return lr if math.isfinite(loss) else None

    def check_domains(self, names: Sequence[str]) -> None:
        """Compares the sets out of domain with those that results are of.

        Raises:
            UsageError: they have other names.
        """
        for key, result in self.by_key.items():
            seen = [name for name in result["evaluation"] if name not in IN_DOMAIN]
            if (
                WHOLE in result
                and math.isfinite(valid_loss(result))
                and sorted(seen) != sorted(names)
            ):
                raise UsageError(
                    f"domains {', '.join(names)}: {self.folder / key}.json has "
                    f"{', '.join(seen) or 'none'}; name them alike, or use another --results"
                )


def valid_loss(result: dict[str, Any] | None) -> float:
    """Loss on the validation split, base 2, at the end; infinite where it is no number."""
    assert result is not None
    loss = result["evaluation"]["valid"]["loss"]
    return float("inf") if loss is None or loss != loss else loss


def missing(cells: Iterable[Cell], results: Results, part: str = "evaluation") -> list[Cell]:
    """Those of which such a part of a result is to come, each once, in order of seed."""
    todo = [c for c in dict.fromkeys(cells) if not is_done(results.get(c) or {}, part)]
    return sorted(todo, key=lambda cell: cell.seed)


def is_done(result: dict[str, Any], part: str) -> bool:
    """Whether a result has that part, or never will, since the training diverged."""
    return part in result or (WHOLE in result and math.isinf(valid_loss(result)))
