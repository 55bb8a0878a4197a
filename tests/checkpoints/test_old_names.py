"""Checkpoints of earlier versions have other names."""

import torch

from fairseq_sffn.checkpoints.old_names import rename
from tests import commands


def test_an_old_checkpoint_evaluates_and_resumes(data_bin, tmp_path):
    """A training that goes on in the middle of an epoch logs the same with the old names."""
    flags = ("--sffn-engine", "embedding_bag", "--save-interval-updates", "3", "--max-epoch", "1")
    whole = commands.train(data_bin, tmp_path / "whole", "avgk", *flags, "--max-update", "8")
    path = tmp_path / "whole" / "checkpoint_1_3.pt"
    state = torch.load(path, weights_only=True)
    state["cfg"]["model"]["sffn_engine"] = "bags"
    meters = state["extra_state"]["metrics"]
    for name, stored in meters.items():
        meters[name] = [(p, k.replace("_importance_", "_mass_"), *rest) for p, k, *rest in stored]
    assert any("_mass_" in k for stored in meters.values() for _, k, *_ in stored)
    old = tmp_path / "old.pt"
    torch.save(state, old)
    assert commands.evaluate(data_bin, old) == commands.evaluate(data_bin, path)
    resumed = commands.train(
        *(data_bin, tmp_path / "resumed", "avgk", *flags, "--max-update", "8"),
        *("--restore-file", str(old)),
    )
    last = commands.records(resumed, "train")[-1]
    assert last["train_load_kl"] == commands.records(whole, "train")[-1]["train_load_kl"]


def test_other_content_stays():
    state = {"cfg": {"model": {"sffn_engine": "loop"}}, "args": None, "extra_state": {}}
    rename(state)
    rename(empty := {})
    assert state["cfg"]["model"] == {"sffn_engine": "loop"} and empty == {}
