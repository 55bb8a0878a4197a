"""Training resumes from the newest whole checkpoint, and warns if that is not the last one."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from fairseq_sffn.checkpoints.resuming import candidates
from fairseq_sffn.errors import UsageError
from tests import commands

FLAGS = ("--save-interval-updates", "2", "--no-epoch-checkpoints", "--disable-validation")


@pytest.fixture(scope="module")
def saved(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model with checkpoints of updates 2, 4, 6 and 7. Only ``checkpoint_last.pt`` has
    update 7."""
    folder = tmp_path_factory.mktemp("saved")
    commands.train(data_bin, folder, "avgk", *FLAGS, "--max-update", "7")
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """Copy the checkpoints, written in the same order."""
    folder = Path(shutil.copytree(saved, tmp_path / "run"))
    for number, name in enumerate(("_1_2", "_1_4", "_1_6", "_last")):
        os.utime(folder / f"checkpoint{name}.pt", (1e9 + number, 1e9 + number))
    return folder


def resume(data: Path, run: Path, *flags: str) -> tuple[int, str]:
    """Train to update 10 and return the first update and the log."""
    log = commands.train(data, run, "avgk", *FLAGS, "--max-update", "10", *flags)
    return min(commands.losses(log)), log


def flip(path: Path) -> None:
    """Damage a tensor's data."""
    content = bytearray(path.read_bytes())
    tensors = torch.load(path, weights_only=True)["model"]
    values = tensors["decoder.layers.0.fc1.weight"].numpy().tobytes()
    content[content.index(values) + 100] ^= 4
    path.write_bytes(content)


def test_the_last_one(data_bin: Path, run: Path) -> None:
    first, log = resume(data_bin, run)
    assert first == 8 and "newest whole" not in log


@pytest.mark.parametrize(
    ("damaged", "first", "reason"),
    [
        ({"last": "gone"}, 7, "there is no checkpoint_last.pt"),
        ({"last": "cut"}, 7, "truncated, or not a checkpoint"),
        ({"last": "flipped"}, 7, "damaged: Bad CRC-32"),
        ({"last": "flipped", "1_6": "flipped"}, 5, "damaged: Bad CRC-32"),
        ({"last": "gone", "1_6": "cut", "1_4": "flipped"}, 3, "damaged: Bad CRC-32"),
        ({"last": "cut", "1_6": "gone", "1_4": "gone"}, 3, "truncated"),
    ],
)
def test_the_newest_whole_one(
    damaged: dict[str, str], first: int, reason: str, data_bin: Path, run: Path
) -> None:
    for name, how in damaged.items():
        path = run / f"checkpoint_{name}.pt"
        if how == "gone":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:-1000])
        else:
            flip(path)
    assert resume(data_bin, run)[0] == first


@pytest.mark.parametrize("back", [20, 30, 38, 60])
def test_a_damaged_directory_of_an_archive(back: int, data_bin: Path, run: Path) -> None:
    content = bytearray((run / "checkpoint_last.pt").read_bytes())
    content[-back] ^= 1
    (run / "checkpoint_last.pt").write_bytes(content)
    assert resume(data_bin, run)[0] in (7, 8)


def test_it_says_so(data_bin: Path, run: Path) -> None:
    flip(run / "checkpoint_last.pt")
    _, log = resume(data_bin, run)
    (line,) = [line for line in log.splitlines() if "newest whole" in line]
    assert f"training goes on from {run / 'checkpoint_1_6.pt'}" in line
    assert "damaged: Bad CRC-32" in line and "--restore-file takes another" in line


def test_none_is_whole(data_bin: Path, run: Path) -> None:
    for path in run.glob("*.pt"):
        flip(path)
    with pytest.raises(UsageError, match=r"Bad CRC-32.*there is no whole checkpoint in --save-dir"):
        resume(data_bin, run)


def test_a_last_one_that_was_not_written(data_bin: Path, run: Path) -> None:
    """After a full disk, ``checkpoint_last.pt`` has fewer updates and an earlier time than another
    file."""
    shutil.copy(run / "checkpoint_1_4.pt", run / "checkpoint_last.pt")
    os.utime(run / "checkpoint_last.pt", (1e9 + 1, 1e9 + 1))
    first, log = resume(data_bin, run)
    assert first == 7 and "checkpoint_last.pt is older" in log


def test_who_goes_back_on_purpose_does(data_bin: Path, run: Path) -> None:
    """A copy over ``checkpoint_last.pt`` is the newest file."""
    shutil.copy(run / "checkpoint_1_2.pt", run / "checkpoint_last.pt")
    first, log = resume(data_bin, run)
    assert first == 3 and "newest whole" not in log


def test_order_of_candidates(run: Path) -> None:
    (run / "other.pt").write_bytes(b"not a name of fairseq's")
    (run / "checkpoint_best.pt").write_bytes(b"damaged")
    names = [path.name for path in candidates(run)]
    assert names[:4] == [f"checkpoint_{name}.pt" for name in ("last", "1_6", "1_4", "1_2")]
    assert names[4:] == ["checkpoint_best.pt"]
    assert candidates(run / "nowhere") == []


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere/checkpoint_last.pt", ""])
def test_named_file_that_is_not_there(name: str, data_bin: Path, tmp_path: Path) -> None:
    for flag in ("--restore-file", *(["--finetune-from-model"] if name else [])):
        with pytest.raises(UsageError, match=f"{flag} {name}: there is no such file"):
            resume(data_bin, tmp_path, flag, name)


def test_named_file_beside_the_last_one(data_bin: Path, run: Path) -> None:
    first, log = resume(data_bin, run, "--restore-file", str(run / "checkpoint_1_2.pt"))
    assert first == 3 and f"not from {run / 'checkpoint_last.pt'}, which is there too" in log


def test_finetuning_that_was_interrupted_goes_on(data_bin: Path, run: Path, tmp_path: Path) -> None:
    """It does not start from its initial model again, even if ``checkpoint_last.pt`` is damaged."""
    other = shutil.copy(run / "checkpoint_1_2.pt", tmp_path / "pretrained.pt")
    assert resume(data_bin, tmp_path / "new", "--finetune-from-model", str(other))[0] == 1
    flip(run / "checkpoint_last.pt")
    assert resume(data_bin, run, "--finetune-from-model", str(other))[0] == 7


def test_skipped_checksums(data_bin: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRSEQ_SFFN_SKIP_CHECKSUMS", "1")
    flip(run / "checkpoint_last.pt")
    assert resume(data_bin, run)[0] == 8
