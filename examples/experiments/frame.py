"""All runs of the tables in one data frame, with their settings, costs and results."""

import contextlib
import functools
import io
import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import MemoryConfig
from fairseq_sffn.tools.cost import cost_by_part, cost_figures, training_flops_per_token
from fairseq_sffn.tools.language_model import build_language_model

from .files import Row, Scale, Table
from .plan import Run, Setting, final_runs, row_runs, sweep_runs
from .results import EVALUATED, IN_DOMAIN, Results, is_diverged, is_done

SWEEP, FINAL, ROW = STAGES = ("sweep", "final", "row")
"""What runs are for: a short run, and one of length 1, that choose the setting of a method; and a
run of a row."""
ONE_PROCESS = ("--sffn-expert-parallel", "1")
"""Flags that build the whole model in this process, even if training shards it."""


UNKNOWN = Setting(0.0)


class Model(NamedTuple):
    """Properties of a model that are known without training it."""

    cost: dict[str, Any]  # see cost_figures
    training_flops: int  # per token
    memories: Mapping[str, MemoryConfig]  # by name of the sparse layer, as in results


def build_model(model: str, flags: str, scale: Scale) -> Model:
    """Build a model at a scale, if possible without memory for its parameters."""
    words = (*shlex.split(scale.flags), *shlex.split(flags), *ONE_PROCESS)
    return _build(scale.arch(model), scale.dictionary, scale.tokens_per_sample, words)


@contextlib.contextmanager
def refused_flags() -> Iterator[None]:
    """Turn the message with which ``argparse`` ends the process into an error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        raise UsageError(said.getvalue().strip().rpartition("error: ")[2] or error) from error


@functools.cache
def _build(arch: str, dictionary: int, context: int, words: tuple[str, ...]) -> Model:
    with refused_flags():
        built = build_language_model(arch, dictionary, context, [*words], strict=False)
    flops = training_flops_per_token(cost_by_part(built, context))
    configs = getattr(built, "memory_configs", {})
    memories = {name.removeprefix("layer"): config for name, config in configs.items()}
    return Model(cost_figures(built, context, None), flops, memories)


class Entry(NamedTuple):
    """A line of the data frame: a run that a table asks for."""

    table: str
    label: str
    group: str
    x: float  # position on the figure's axis; NaN: none
    stage: str  # see STAGES
    run: Run
    model: Model
    seed: int
    lr: float  # as init_scale, NaN: not chosen yet
    init_scale: float
    tokens: int
    flops: int  # of training
    result: dict[str, Any]  # content of the JSON file; empty if it lacks what the table shows
    done: bool
    diverged: bool
    perplexity: dict[str, float]  # by set; empty if a run of the row diverged: a mean would flatter
    valid: float  # perplexity; NaN: unknown
    test: float
    out_of_domain: float  # mean perplexity of the sets


class Experiments:
    """Tables, by name, and results. ``frame`` has all runs of the tables; its columns are the
    attributes of :class:`Entry`."""

    def __init__(self, scale: Scale, results: Results, tables: Mapping[str, Table]) -> None:
        self.scale, self.results, self.tables = scale, results, tables
        entries = [entry for table in tables.values() for entry in self._entries(table)]
        self.frame = pd.DataFrame(entries, columns=Entry._fields)

    def runs(self, table: Table, stage: str = ROW) -> pd.DataFrame:
        """Return the runs of a table, of one of ``STAGES``."""
        return self.frame[(self.frame.table == table.name) & (self.frame.stage == stage)]

    def _entries(self, table: Table) -> Iterator[Entry]:
        """Yield the runs of a table. A sweep has its row's label if the row has its own sweep, and
        otherwise the label of the model's row without flags, or the model's name. Until finalists
        are known, the first settings stand for them."""
        section = "zero_shot" if table.zero_shot else EVALUATED
        defaults = {row.model: row.label for row in reversed(table.rows) if not row.flags}
        swept = set()
        for row in table.rows:
            setting = self.results.setting(row) or UNKNOWN
            runs = row_runs(row, self.scale, setting)
            yield from self._of_row(table, row, row.label, ROW, setting, runs, section)
            label = row.label if row.sweep else defaults.get(row.model, row.model)
            short = sweep_runs(row, self.scale)
            first = next(iter(short.values()), None)
            if first is None or first in swept:
                continue
            swept.add(first)
            for setting, run in short.items():
                yield from self._of_row(table, row, label, SWEEP, setting, [run], "evaluation")
            count = self.scale.finalists
            if count > 1:
                finalists = self.results.finalists(row) or [*short][:count]
                for setting, run in final_runs(row, self.scale, finalists).items():
                    yield from self._of_row(table, row, label, FINAL, setting, [run], EVALUATED)

    def _of_row(
        self,
        table: Table,
        row: Row,
        label: str,
        stage: str,
        setting: Setting,
        runs: list[Run],
        section: str,
    ) -> Iterator[Entry]:
        """Yield runs that differ only in their seed, and whose results need a section."""
        results = [self.results.get(run) or {} for run in runs]
        results = [result if is_done(result, section) else {} for result in results]
        diverged = [is_diverged(result) for result in results]
        lr, init_scale = (math.nan, math.nan) if setting is UNKNOWN else setting
        x = float(str(row.x).replace("{ffn}", str(self.scale.ffn_embed_dim)) or "nan")
        for run, result, gone in zip(runs, results, diverged, strict=True):
            try:
                model = build_model(run.model, run.flags, self.scale)
            except UsageError as error:
                raise UsageError(f"{table.name}, row {row.label!r}: {error}") from error
            tokens = run.tokens(self.scale)
            evaluation = {} if any(diverged) else result.get("evaluation", {})
            sets = {name: found["perplexity"] for name, found in evaluation.items()}
            domains = [value for name, value in sets.items() if name not in IN_DOMAIN]
            yield Entry(
                *(table.name, label, row.group, x, stage, run, model, run.seed, lr, init_scale),
                *(tokens, model.training_flops * tokens, result, bool(result), gone, sets),
                valid=sets.get("valid", math.nan),
                test=sets.get("test", math.nan),
                out_of_domain=sum(domains) / len(domains) if domains else math.nan,
            )
