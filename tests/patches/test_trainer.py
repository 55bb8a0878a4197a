"""The trainer that replaces fairseq's, and the patches that go with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fairseq.trainer import Trainer

from fairseq_sffn.patches import checkpoints, collectives, trainer, training
from fairseq_sffn.patches.registry import Patch
from tests import commands

PATCHES = {
    patch.target: patch
    for module in (trainer, training, checkpoints, collectives)
    for patch in vars(module).values()
    if isinstance(patch, Patch)
}


def test_every_trainer_is_extended() -> None:
    """Also one whose class was imported, or derived, before the plugin."""
    assert type(Trainer.__new__(Trainer)) is trainer.SFFNTrainer

    class Own(Trainer):
        def get_num_updates(self):
            return super().get_num_updates() + 1

    own = Own.__new__(Own)
    own._num_updates = 1
    assert isinstance(own, trainer.SFFNTrainer) and own.get_num_updates() == 2
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


def test_a_stored_configuration_has_fairseqs_options_only(data_bin: Path, tmp_path: Path) -> None:
    flags = ("--write-checkpoints-asynchronously", "--max-update", "1")
    commands.train(data_bin, tmp_path, "avgk", *flags)
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["cfg"]
    assert "write_in_background" not in stored["checkpoint"]
    assert stored["distributed_training"]["distributed_backend"] == "nccl"  # fairseq's default
