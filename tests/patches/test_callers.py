"""Python callers pass stand-ins for files, folders and trainers to fairseq's checkpoint functions,
as fairseq's own tests do."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from fairseq.dataclass.configs import CheckpointConfig
from omegaconf import OmegaConf

from fairseq_sffn.errors import UsageError


def trainer() -> MagicMock:
    """Make a stand-in for a trainer that saves nowhere."""
    result = MagicMock(data_parallel_rank=0, checkpoint_suffix="", is_data_parallel_master=True)
    result.load_checkpoint.return_value = None
    result.get_num_updates.return_value = 3
    result.task = SimpleNamespace()
    return result


def test_no_save_directory() -> None:
    config = OmegaConf.structured(CheckpointConfig(save_dir="", no_save=False))
    config = OmegaConf.to_container(config) | {"save_dir": None, "restore_file": "given.pt"}
    epochs = MagicMock(epoch=1)
    epochs.end_of_epoch.return_value = False
    stand_in = trainer()
    with patch("os.makedirs"), patch("os.path.join", lambda *names: names[-1]):
        checkpoint_utils.save_checkpoint(OmegaConf.create(config), stand_in, epochs, None)
        checkpoint_utils.load_checkpoint(OmegaConf.create(config), stand_in)
    assert stand_in.save_checkpoint.call_args.args[0] == "checkpoint_last.pt"
    assert stand_in.load_checkpoint.call_args.args[0] == "given.pt"


def test_files_that_a_path_manager_makes_up() -> None:
    average = {"w": torch.ones(2)}
    with (
        patch.object(checkpoint_utils.PathManager, "open") as opened,
        patch("torch.load", return_value={"extra_state": {"ema": average}}),
    ):
        state = checkpoint_utils.load_ema_from_checkpoint("made-up.pt")
    opened.assert_called_with("made-up.pt", "rb")
    assert torch.equal(state["model"]["w"], average["w"])


def test_a_moving_average_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        checkpoint_utils.load_ema_from_checkpoint(str(tmp_path / "nowhere.pt"))
    torch.save({"extra_state": {}}, tmp_path / "none.pt")
    with pytest.raises(UsageError, match="holds no moving average"):
        checkpoint_utils.load_ema_from_checkpoint(str(tmp_path / "none.pt"))


def test_splits_that_would_not_be_used_are_fairseqs_error(tmp_path: Path) -> None:
    """A command prints a line. A Python caller gets the exception of fairseq."""
    for name in ("train", "valid", "valid1"):
        (tmp_path / f"{name}.bin").touch()
    dataset = SimpleNamespace(
        train_subset="train",
        valid_subset="valid",
        disable_validation=False,
        combine_valid_subsets=False,
        ignore_unused_valid_subsets=False,
    )
    config = SimpleNamespace(dataset=dataset, task=SimpleNamespace(data=str(tmp_path)))
    with pytest.raises(ValueError, match="will be ignored"):
        data_utils.raise_if_valid_subsets_unintentionally_ignored(config)
