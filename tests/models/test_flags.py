"""The plugin's flags have new names, as fairseq silently drops a flag whose name is taken."""

import argparse
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from fairseq import options
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_sffn.criterions.sffn_cross_entropy import SFFNCrossEntropyConfig
from fairseq_sffn.models.transformer_lm import SparseTransformerLM
from fairseq_sffn.tasks.sffn_language_modeling import SFFNLanguageModelingConfig
from tests.commands import USER_DIR

OURS = ("sffn_cross_entropy", "sffn_label_smoothed_cross_entropy", "sffn_language_modeling")


def own_fields(config: type[FairseqDataclass]) -> set[str]:
    """Return the options that a dataclass defines, without those that it takes over."""
    return {
        field.name
        for field in fields(config)
        if not field.name.startswith("_") and not str(field.default).startswith("${")
    }


def added_fields() -> dict[str, set[str]]:
    """Return the plugin's options: part of the configuration -> names."""
    model = own_fields(SparseTransformerLM.config_class)
    return {
        "model": model - own_fields(TransformerLanguageModelConfig),
        "task": own_fields(SFFNLanguageModelingConfig) - own_fields(LanguageModelingConfig),
        "criterion": own_fields(SFFNCrossEntropyConfig),
    }


def fairseq_fields() -> dict[str, set[str]]:
    """Return the options of fairseq that may appear together with ours: where they are defined ->
    names."""
    groups = {
        field.name: field.type
        for field in fields(FairseqConfig)
        if isinstance(field.type, type) and is_dataclass(field.type)
    }
    groups |= {f"task {name}": config for name, config in TASK_DATACLASS_REGISTRY.items()}
    for registry, entries in REGISTRIES.items():
        groups |= {
            f"{registry} {name}": config for name, config in entries["dataclass_registry"].items()
        }
    groups["transformer_lm"] = TransformerLanguageModelConfig
    return {
        where: {f.name for f in fields(config)} - {"_name"}
        for where, config in groups.items()
        if is_dataclass(config) and where.split()[-1] not in OURS
    }


def legacy_flags(cls: Any) -> set[str]:
    """Return the flags of a class that adds them to a parser itself."""
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    if hasattr(cls, "add_args"):
        cls.add_args(parser)
    return set(parser._option_string_actions)


def test_what_is_added() -> None:
    added = added_fields()
    assert {"sffn_selector", "sffn_block_size", "hash_table", "avgk_exclude_bias"} <= added["model"]
    assert added["task"] == {"hash_counts", "eval_capacity_factor"}
    losses = {"balance_loss_weight", "balance_loss_reduce", "balance_loss_scope", "z_loss_weight"}
    assert added["criterion"] == losses


def test_no_option_of_ours_is_one_of_fairseq() -> None:
    for part, ours in added_fields().items():
        for where, theirs in fairseq_fields().items():
            assert not ours & theirs, f"{part} and {where}"


def test_no_option_of_ours_is_there_twice() -> None:
    added = added_fields()
    assert len(set.union(*added.values())) == sum(map(len, added.values()))


def test_no_flag_of_ours_is_one_that_fairseq_adds_by_hand() -> None:
    ours = {f"--{name.replace('_', '-')}" for names in added_fields().values() for name in names}
    classes = {**TASK_REGISTRY, **CRITERION_REGISTRY}
    for entries in REGISTRIES.values():
        classes |= entries["registry"]
    for name, cls in classes.items():
        assert name in OURS or not ours & legacy_flags(cls), name


@pytest.mark.parametrize(
    "model", sorted(name for name, cls in MODEL_REGISTRY.items() if hasattr(cls, "config_class"))
)
def test_parser_drops_no_flag_of_ours(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of fairseq-train reports each name that is taken."""
    taken: set[str] = set()
    refuse = argparse._ActionsContainer._handle_conflict_error

    def record(self: Any, action: Any, conflicts: Any) -> None:
        taken.update(name for name, _ in conflicts)
        refuse(self, action, conflicts)

    monkeypatch.setattr(argparse._ActionsContainer, "_handle_conflict_error", record)
    parser = options.get_training_parser("language_modeling")
    arguments = ["data", "--user-dir", USER_DIR, "--task", "sffn_language_modeling"]
    arguments += ["--arch", model, "--criterion", "sffn_cross_entropy", "--optimizer", "adam"]
    options.parse_args_and_arch(parser, arguments)
    known = {name for action in parser._actions for name in action.option_strings}
    ours = {f"--{name.replace('_', '-')}" for names in added_fields().values() for name in names}
    if "dense" not in model:
        assert ours <= known
    assert not {name for name in taken if name in ours or name.startswith("--no-")}
    if model.startswith("transformer_lm"):
        assert {"--no-share-decoder-input-output-embed", "--no-decoder-normalize-before"} & known
