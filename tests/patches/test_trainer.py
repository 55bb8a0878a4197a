"""The trainer that replaces fairseq's, and the patches that go with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.trainer import Trainer

from fairseq_sffn.patches import checkpoints, collectives, trainer, training
from fairseq_sffn.patches.registry import Patch
from tests import commands
from tests.models.small_lm import random_tokens, small_lm

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


@pytest.mark.parametrize("method", ["dense", "avgk"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_dummy", [True, False])
def test_models_with_sparse_layers_are_told_of_dummies(
    method: str, training: bool, is_dummy: bool
) -> None:
    """A dummy stands for the sentences that a rank no longer has. No block may count its tokens."""
    model = small_lm(method).train(training)
    own = Trainer.__new__(Trainer)
    own.cfg = FairseqConfig()
    own.cuda = own.tpu = own.pipeline_model_parallel = False
    own._model = own._wrapped_model = model
    own._dummy_batch, batch = (
        {"net_input": {"prev_output_tokens": random_tokens(rows, 4)}} for rows in (2, 3)
    )
    sample, returned = own._prepare_sample(None if is_dummy else batch)
    tokens = sample["net_input"].pop("prev_output_tokens")
    assert len(tokens) == (2 if is_dummy else 3)
    assert sample["net_input"] == ({"is_dummy": True} if is_dummy and method == "avgk" else {})
    # fairseq drops a dummy of a validation. In training, the trainer does.
    assert returned == (is_dummy and not training)
    assert not training or own._is_dummy == is_dummy
    model(tokens, **sample["net_input"])


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
