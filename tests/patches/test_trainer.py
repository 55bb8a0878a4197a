"""The trainer that replaces fairseq's, and the patches that go with it."""

from __future__ import annotations

import fairseq.trainer
import pytest
from fairseq_cli import train as train_command

from fairseq_sffn.patches import checkpoints, collectives, trainer, training
from fairseq_sffn.patches.registry import Patch, fingerprint

PATCHES = {
    patch.target: patch
    for module in (trainer, training, checkpoints, collectives)
    for patch in vars(module).values()
    if isinstance(patch, Patch)
}


def test_every_module_has_the_same_trainer() -> None:
    assert fairseq.trainer.Trainer is train_command.Trainer is trainer.SFFNTrainer
    assert trainer.SFFNTrainer.__mro__[-2].__module__ == "fairseq.trainer"


def test_there_are_few() -> None:
    assert len(PATCHES) == 10


@pytest.mark.parametrize("target", PATCHES)
def test_applying_twice_changes_nothing(target: str) -> None:
    patch = PATCHES[target]
    owner, name = patch.owner()
    before = getattr(owner, name)
    patch.apply()
    assert getattr(owner, name) is before and patch.is_applied()


@pytest.mark.parametrize("target", PATCHES)
def test_this_fairseq_is_one_that_it_was_written_for(target: str) -> None:
    patch = PATCHES[target]
    owner, name = patch.owner()
    replacement = getattr(owner, name)
    original = replacement if not patch.members else trainer.Trainer
    assert fingerprint(original, patch.members) in patch.written_for
