"""The table of ranges: the values that it accepts, and the messages for all others."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    MODEL_REGISTRY,
)
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask

from fairseq_sffn.errors import UsageError, flag
from fairseq_sffn.options import checks, ranges
from fairseq_sffn.options.ranges import LARGEST, RANGES, Range
from fairseq_sffn.options.relations import RELATIONS

WITHOUT_DEFAULTS = {("lr_scheduler", "tri_stage")}
"""Groups that fairseq refuses unless some options are set."""


def of_dataclass(config: type, name: str) -> SimpleNamespace:
    """Return the defaults of a group, with ``None`` for those that are taken from other groups."""
    values = {k: None if "${" in str(value) else value for k, value in vars(config()).items()}
    return SimpleNamespace(**{**values, "_name": name})


def of_parser(cls: Any, name: str) -> SimpleNamespace:
    """Return the defaults of a class that adds its flags by hand."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    cls.add_args(parser)
    return SimpleNamespace(
        **{action.dest: action.default for action in parser._actions}, _name=name
    )


def defaults() -> Iterator[tuple[str, str, Any]]:
    """Yield group, name and options of everything that fairseq and the plugin have registered."""
    for field in fields(FairseqConfig):
        if is_dataclass(field.type) and field.name in RANGES:
            yield field.name, "", of_dataclass(field.type, "")
    for name, config in TASK_DATACLASS_REGISTRY.items():
        yield "task", name, of_dataclass(config, name)
    for group in ("criterion", "optimizer", "lr_scheduler"):
        dataclasses = REGISTRIES[group]["dataclass_registry"]
        for name, cls in REGISTRIES[group]["registry"].items():
            made = name in dataclasses
            yield (
                group,
                name,
                of_dataclass(dataclasses[name], name) if made else of_parser(cls, name),
            )
    for name, cls in MODEL_REGISTRY.items():
        if name in MODEL_DATACLASS_REGISTRY and checks.is_transformer(cls):
            yield "model", name, of_dataclass(MODEL_DATACLASS_REGISTRY[name], name)
    for name, cls in ARCH_MODEL_REGISTRY.items():
        if checks.is_transformer(cls):
            parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
            cls.add_args(parser)
            args = parser.parse_args([])
            ARCH_CONFIG_REGISTRY[name](args)
            args._name = name
            yield "model", f"--arch {name}", args


DEFAULTS = {(group, name): values for group, name, values in defaults()}


def test_defaults_cover_what_the_plugin_is_trained_with() -> None:
    known = {
        *(("criterion", name) for name in CRITERION_REGISTRY if "sffn" in name),
        *(("optimizer", name) for name in ("adam", "sffn_adam", "sgd", "adafactor", "nag")),
        *(("lr_scheduler", name) for name in ("fixed", "inverse_sqrt", "cosine")),
        *(("task", name) for name in ("language_modeling", "translation")),
        *(("model", name) for name in ("transformer_lm_avgk_tiny", "transformer_avgk")),
        *(("model", f"--arch {name}") for name in ("transformer_lm_gpt", "transformer_wmt_en_de")),
        *((group, "") for group in ("common", "dataset", "optimization", "generation", "ema")),
    }
    assert known <= DEFAULTS.keys()


@pytest.mark.parametrize(
    ("group", "name"), [key for key in DEFAULTS if key not in WITHOUT_DEFAULTS]
)
def test_defaults_are_in_their_ranges(group: str, name: str) -> None:
    checks.check_group(group, DEFAULTS[group, name])


def test_every_option_of_the_table_exists() -> None:
    """A misspelt option would never be checked."""
    there: dict[str, set[str]] = {}
    for (group, name), values in DEFAULTS.items():
        for key in (group, f"{group} {name}"):
            there.setdefault(key, set()).update(vars(values))
    for key, table in RANGES.items():
        assert table.keys() <= there[key] | there[key.split()[0]], key
    for relation in RELATIONS:
        assert relation.option in there[relation.group], relation


def outside(range: Range) -> list[Any]:
    """Return numbers that are not in a range: beyond its ends, and not finite."""
    wrong = [math.nan, math.inf, -math.inf]
    special = [value for value, _ in range.special]
    if range.low > -math.inf:
        wrong += [range.low - 7, *([range.low] if range.above else [])]
    if range.high < math.inf:
        wrong += [range.high + 7, *([range.high] if range.below else [])]
    return [number for number in wrong if number not in special]


TABLE = [(key, name, range) for key, table in RANGES.items() for name, range in table.items()]


@pytest.mark.parametrize(("key", "name", "range"), TABLE, ids=[f"{k}.{n}" for k, n, _ in TABLE])
def test_what_is_outside_is_told_in_one_line(key: str, name: str, range: Range) -> None:
    group, _, choice = key.partition(" ")
    choice = choice or ("transformer_lm" if group == "model" else "")
    for number in outside(range):
        value = [number] * abs(range.length) if range.length else number
        with pytest.raises(UsageError) as stopped:
            checks.check_group(group, SimpleNamespace(_name=choice, **{name: value}))
        line = str(stopped.value)
        shown = ",".join(map(str, value)) if range.length else str(number)
        assert line.startswith(f"{flag(name)} {shown}: must be ") and "\n" not in line
    for number, _ in range.special:
        assert range.holds(number)


@pytest.mark.parametrize("value", [[], [1], [1, 2, 3], "", "x", "(0.9", "0.9", "(0.9, 'x')"])
def test_lists_of_another_length_are_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^--adam-betas .*: must be two numbers, each at least 0"):
        checks.check_group("optimizer", SimpleNamespace(_name="adam", adam_betas=value))


@pytest.mark.parametrize("value", [[0.9, 0.98], (0.9, 0.98), "(0.9, 0.98)", "[0, 0]", "0.9,0.98"])
def test_lists_are_read_as_fairseq_reads_them(value: Any) -> None:
    checks.check_group("optimizer", SimpleNamespace(_name="adam", adam_betas=value))


@pytest.mark.parametrize(
    ("range", "number", "reason"),
    [
        (ranges.RATE, 1.5, "must be at least 0 and below 1"),
        (ranges.POSITIVE, math.inf, "must be positive and finite"),
        (ranges.NOT_NEGATIVE, -1, "must be at least 0 and finite"),
        (ranges.SIZE, 0, "must be at least 1"),
        (ranges.SIZE, LARGEST + 1, f"must be at least 1 and at most {LARGEST}"),
        (ranges.EVERY, 0, "must be at least 1, or -1 (off)"),
        (ranges.FINITE, math.nan, "must be finite"),
    ],
)
def test_reasons(range: Range, number: float, reason: str) -> None:
    assert not range.holds(number) and range.reason(number) == reason


def test_options_of_other_models_are_left_alone() -> None:
    """The layers of a convolutional model are a text, and its dropout may mean something else."""
    checks.check_group("model", SimpleNamespace(_name="fconv", decoder_layers="[(512, 3)]"))
    checks.check_group("model", SimpleNamespace(_name="fconv", dropout=2.0))
    with pytest.raises(UsageError, match=r"^--dropout 2\.0: "):
        checks.check_group("model", SimpleNamespace(_name="transformer", dropout=2.0))


@pytest.mark.parametrize(
    ("group", "registry", "base", "option"),
    [
        ("model", ARCH_MODEL_REGISTRY, TransformerLanguageModel, {"decoder_layers": 0}),
        ("task", TASK_REGISTRY, LanguageModelingTask, {"tokens_per_sample": 0}),
        ("criterion", CRITERION_REGISTRY, CrossEntropyCriterion, {"label_smoothing": 2.0}),
    ],
)
def test_options_of_other_plugins_are_left_alone(
    group: str, registry: Any, base: type, option: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options with the same name may have another meaning there."""
    theirs = type("Theirs", (base,), {"__module__": "their_plugin.models"})
    monkeypatch.setitem(registry, "theirs", theirs)
    checks.check_group(group, SimpleNamespace(_name="theirs", **option))
