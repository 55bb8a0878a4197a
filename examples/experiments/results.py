"""The result of each run: a JSON file."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools.training_log import log_records

from .files import Row, Scale, first_error
from .plan import Run, Setting, final_runs, sweep_runs

IN_DOMAIN = ("valid", "test")
"""Evaluation sets from the corpus that models are trained on."""
EVALUATED = "routing"
"""Section of a result that runs of a sweep do not have."""
ROUTING = ("load_max", "load_entropy", "unused_blocks", "load_kl", "dropped_share", "balance_loss")
"""Values that are copied from a log in addition to the loss, where they are logged."""


def curve(path: Path) -> dict[str, Any]:
    """Summarise the log of a run.

    Returns:
        ``train`` and ``valid``: lists of update, loss (base 2) and values of ``ROUTING``;
        ``tokens_per_second``: speed of training without validation.
    """
    lists: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
    words = seconds = 0.0
    validated = False
    for kind, record in log_records(path):
        values = {"update": record["num_updates"], "loss": record["loss"]}
        values |= {name: record[name] for name in ROUTING if name in record}
        lists["valid" if kind == "valid" else "train"].append(values)
        # fairseq counts the time of a validation in the next record of training.
        if kind != "valid" and record.get("wps") and not validated:
            words, seconds = words + record["wpb"], seconds + record["wpb"] / record["wps"]
        validated = kind == "valid"
    speed = words / seconds if seconds else 0.0
    return {**lists, "tokens_per_second": round(speed, 1)}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_json(result) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _json(value: Any, indent: str = "\n") -> str:
    """Format JSON with each list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    items = (f"{json.dumps(name)}: {_json(item, indent + ' ')}" for name, item in value.items())
    return "{" + ",".join(f"{indent} {item}" for item in items) + indent + "}"


def shape(**names: Any) -> Any:
    """Make the shape of a JSON object from types by name. Other names are ignored."""
    fields: Any = {name: (kind, ...) for name, kind in names.items()}
    return create_model("Shape", **fields)


OPTIONAL: Any = float | None
RECORD: Any = shape(update=float, loss=float)
SET: Any = shape(perplexity=float)
RESULT: Any = shape(
    **{"data": str, "machine": str, "versions": shape(fairseq_sffn=str)},
    training=shape(train=list[RECORD], tokens_per_second=float),
    evaluation=shape(valid=shape(loss=OPTIONAL)),
)
"""Shape of the part of every result that reports read."""
LAYER: Any = shape(
    **{"counts": list[int], "block_bits": float, "token_bits": OPTIONAL},
    **{"top_tokens": list[list[str]], "blocks": list[list[int]], "positions": list[int]},
)
TASK: Any = shape(
    **{"task": str, "documents": int, "random": float, "accuracy": float},
    **dict.fromkeys(("standard_error", "accuracy_norm", "standard_error_norm"), OPTIONAL),
)
EVALUATION = [shape(evaluation=shape(valid=SET, test=SET)), shape(evaluation=dict[str, SET])]
SECTIONS = {
    EVALUATED: [*EVALUATION, shape(routing=dict[str, LAYER])],
    "zero_shot": [*EVALUATION, shape(zero_shot=shape(tasks=list[TASK]))],
}
"""Further shapes of a result that has a section, unless its run diverged."""


def read(path: Path) -> dict[str, Any]:
    """Read a result, and check that it has what reports read."""
    try:
        text = path.read_bytes()
        RESULT.model_validate_json(text, strict=True)
        result = json.loads(text)
        for section, shapes in SECTIONS.items():
            if section in result and math.isfinite(valid_loss(result)):
                for one in shapes:
                    one.model_validate_json(text, strict=True)
    except (OSError, ValidationError) as error:
        reason = first_error(error) if isinstance(error, ValidationError) else error
        raise UsageError(f"{path}: is no result: {reason}") from error
    return result


class Results:
    """The results in a folder, by the key of their run. They are from the text with the fingerprint
    ``data``, or from any one text."""

    def __init__(self, folder: Path, scale: Scale, data: str | None = None) -> None:
        self.folder, self.scale = folder, scale
        self.by_key = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
        texts = {result["data"] for result in self.by_key.values()}
        if data is not None and texts - {data}:
            others = ", ".join(sorted(texts - {data}))
            raise UsageError(
                f"{folder}: has results of the text {others}, and this is {data}; keep those of "
                "this text in another folder, with --results"
            )
        if len(texts) > 1:
            raise UsageError(f"{folder}: has results of several texts: {', '.join(sorted(texts))}")

    def get(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run; ``None`` where it is missing."""
        return self.by_key.get(run.key(self.scale))

    def refresh(self, run: Run) -> None:
        """Read the result of a run again, which another process may have written."""
        if (path := self.path(run)).exists():
            self.by_key[path.stem] = read(path)

    def path(self, run: Run) -> Path:
        """Return the file of a run's result."""
        return self.folder / f"{run.key(self.scale)}.json"

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Store the result of a run."""
        self.by_key[run.key(self.scale)] = result
        write(self.path(run), result)

    def setting(self, row: Row) -> Setting | None:
        """Return the setting of a row; ``None`` where it is not known yet or all diverged.

        It is the finalist with the lowest validation loss. If the row fixes the learning rate or
        the initial scale, the other is that of the best short run with it, or of the best of all
        where the sweep does not have it.
        """
        lr, init_scale = row.lr, row.init_scale
        best = [Setting(self.scale.learning_rates[0], self.scale.init_scales[0])]
        if runs := sweep_runs(row, self.scale):
            best = self._best(runs)
            if lr is not None or init_scale is not None:
                same = [one for one in best if lr in (None, one.lr)]
                same = [one for one in same if init_scale in (None, one.init_scale)]
                best = same or best
            elif self.scale.finalists > 1:
                best = self._best(final_runs(row, self.scale, best[: self.scale.finalists]))
            if not best:
                return None
        return Setting(
            best[0].lr if lr is None else lr,
            best[0].init_scale if init_scale is None else init_scale,
        )

    def finalists(self, row: Row) -> list[Setting]:
        """Return the settings with the lowest validation losses in a row's sweep, the best first.
        There are none where the sweep is not finished or all of its runs diverged."""
        return self._best(sweep_runs(row, self.scale))[: self.scale.finalists]

    def _best(self, runs: Mapping[Setting, Run]) -> list[Setting]:
        """Return the settings whose runs did not diverge, by loss; none until all runs are done."""
        found = {setting: self.get(run) for setting, run in runs.items()}
        losses = {setting: valid_loss(result) for setting, result in found.items() if result}
        finite = [setting for setting in losses if math.isfinite(losses[setting])]
        return sorted(finite, key=losses.__getitem__) if len(losses) == len(runs) else []

    def check_domains(self, names: Sequence[str]) -> None:
        """Check that the out-of-domain sets have the names that they have in the results."""
        for key, result in self.by_key.items():
            seen = [name for name in result["evaluation"] if name not in IN_DOMAIN]
            if is_done(result, EVALUATED) and not is_diverged(result) and {*seen} != {*names}:
                raise UsageError(
                    f"domains {', '.join(names)}: {self.folder / key}.json has "
                    f"{', '.join(seen) or 'none'}; name them alike, or use another --results"
                )


def valid_loss(result: dict[str, Any]) -> float:
    """Return the final loss on the validation split, base 2; infinity where the run diverged."""
    loss = result["evaluation"]["valid"]["loss"]
    return math.inf if loss is None or math.isnan(loss) else loss


def is_diverged(result: dict[str, Any]) -> bool:
    """Return whether there is a result and its run diverged."""
    return bool(result) and math.isinf(valid_loss(result))


def is_done(result: dict[str, Any], section: str) -> bool:
    """Return whether a result has a section, or never will, as its run diverged."""
    return section in result or (EVALUATED in result and is_diverged(result))
