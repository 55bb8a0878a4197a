"""No string of any option is evaluated, imported or opened, and no unknown name is accepted."""

import itertools
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from fairseq import models, registry, tasks

from fairseq_sffn.checkpoints.stored_strings import STRINGS
from fairseq_sffn.errors import UsageError
from fairseq_sffn.models.plugin_model import PluginModel
from fairseq_sffn.patches import stored_configuration as rules
from tests.patches.payloads import PAYLOADS


def reachable() -> list[tuple[str, str, type]]:
    """Return group, name and dataclass of everything that a checkpoint may name. Each kind of model
    is there once."""
    found: dict[Any, tuple[str, str, type]] = {}
    for name in (*models.MODEL_REGISTRY, *models.ARCH_MODEL_REGISTRY):
        try:
            dataclass = rules.dataclass_of("model", name)
        except UsageError:
            continue
        assert dataclass is not None
        options = tuple(option.name for option in fields(dataclass))
        found.setdefault(options, ("model", name, dataclass))
    for group, names in rules.NAMES.items():
        for name in names:
            found[group, name] = (group, name, rules.dataclass_of(group, name))  # type: ignore[assignment]
    for group in rules.RECORDED:
        for name, dataclass in registry.REGISTRIES[group]["dataclass_registry"].items():
            found[group, name] = (group, name, dataclass)
    for group, dataclass in rules.GROUPS.items():
        found[group] = (group, group, dataclass)
    return list(found.values())


@pytest.mark.parametrize(("group", "name", "dataclass"), reachable())
def test_every_option_of_every_dataclass(
    group: str, name: str, dataclass: type, witness: Path
) -> None:
    """A payload is refused, or does not reach fairseq. The same holds for lists and dictionaries
    with payloads if an option holds a list."""
    for option, payload in itertools.product(rules.options_in(dataclass), PAYLOADS.values()):
        text = payload.format(witness=str(witness))
        for value in (text, [text], {"_target_": text}, (1, text)):
            try:
                kept = rules.safe_options(group, {option.name: value}, dataclass)
            except UsageError as error:
                assert rules.flag(option.name) in str(error)
            else:
                assert "witness" not in str(kept) and "${" not in str(kept), option.name


@pytest.mark.parametrize(("group", "name", "dataclass"), reachable())
def test_defaults_are_kept(group: str, name: str, dataclass: type) -> None:
    if not is_dataclass(dataclass):
        return
    options = {option.name: rules.default_of(option) for option in rules.options_in(dataclass)}
    assert rules.safe_options(group, options, dataclass) == options


def test_every_string_has_a_rule() -> None:
    """A new string option of fairseq is refused until somebody checks it. All current ones have
    been checked."""
    for group, name, dataclass in reachable():
        if group not in rules.BUILT:
            continue
        for option in rules.options_in(dataclass):
            known = option.name in STRINGS or option.name in rules.FILES
            unused = option.name.endswith("xformers_att_config")
            assert known or unused or str not in rules.types_of(option), (group, name, option.name)


def test_names_that_are_refused() -> None:
    """All other names that fairseq registers are refused, and so are names that nobody
    registers."""
    registered = {
        "model": {*models.MODEL_REGISTRY, *models.ARCH_MODEL_REGISTRY},
        "task": {*tasks.TASK_REGISTRY},
        **{
            group: {*registry.REGISTRIES[group]["registry"]}
            for group in ("criterion", "tokenizer", "bpe")
        },
    }
    allowed = {
        group: {name for name in names if may_name(group, name)}
        for group, names in registered.items()
    }
    for name in allowed.pop("model"):
        found = models.MODEL_REGISTRY.get(name) or models.ARCH_MODEL_REGISTRY[name]
        stock = found.__name__ in ("TransformerLanguageModel", "TransformerModel")
        assert issubclass(found, PluginModel) or stock
    assert allowed == {group: set(names) for group, names in rules.NAMES.items()}
    for group in registered:
        assert not any(
            may_name(group, name) for name in ("nosuch", "os.system", "", None, 3, ["a"])
        )


def may_name(group: str, name: Any) -> bool:
    try:
        rules.dataclass_of(group, name)
    except UsageError:
        return False
    return True
