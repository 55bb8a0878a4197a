"""Reading a checkpoint runs none of its contents, and notices damage."""

import argparse
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sffn.checkpoints.integrity import fingerprint, is_not_averaged
from fairseq_sffn.checkpoints.reading import SKIP_CHECKSUMS, DamagedCheckpoint, read_file
from fairseq_sffn.errors import UsageError


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("mapped", [False, True])
def test_plain_values(mapped: bool, tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.ones(2), "empty": torch.ones(0), "half": torch.ones(3).bfloat16()},
        "cfg": {"a": [1, None, "b"]},
        "args": argparse.Namespace(arch="a"),
    }
    read = read_file(save(state, tmp_path / "good.pt"), mapped=mapped)
    assert read["cfg"] == state["cfg"] and read["args"] == state["args"]
    torch.testing.assert_close(read["model"], state["model"], rtol=0, atol=0)


@pytest.mark.parametrize("size", [1.0, 0.9, 0.02])
def test_file_of_old_pytorch(size: float, tmp_path: Path) -> None:
    """PyTorch before 1.6 had another file format. It is read without running anything in the file,
    too."""
    path = tmp_path / "old.pt"
    state = {"model": {"w": torch.arange(1000.0)}, "args": argparse.Namespace(arch="a")}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content))])
    if size == 1:
        assert torch.equal(read_file(path, mapped=True)["model"]["w"], torch.arange(1000.0))
        torch.save({"x": print}, path, _use_new_zipfile_serialization=False)
        with pytest.raises(UsageError, match="refused, it holds more than tensors"):
            read_file(path)
    else:
        with pytest.raises(DamagedCheckpoint, match="damaged, or not a checkpoint"):
            read_file(path)


@pytest.mark.parametrize("value", [print, SimpleNamespace(a=1), Path("a")])
def test_objects_are_refused(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"x": value}, tmp_path / "bad.pt")
    for forced in ("0", "1"):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
        with pytest.raises(UsageError, match="refused, it holds more than tensors"):
            checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    whole = save({"w": torch.ones(1000)}, tmp_path / "whole.pt").read_bytes()
    cases = {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "tail": whole[:-1]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match="truncated, or not a checkpoint"):
            read_file(tmp_path / name)
    for nothing in (tmp_path, tmp_path / "nowhere", tmp_path / "text" / "below"):
        with pytest.raises(DamagedCheckpoint, match="there is no such file"):
            read_file(nothing)


def test_every_flipped_bit_is_noticed_or_without_consequence(tmp_path: Path) -> None:
    """Damage to the data of tensors is always noticed. Elsewhere the reader returns what was
    written, or fails."""
    tensors, text = {"w": torch.arange(3000.0), "n": torch.arange(50)}, "word" * 20
    path = save({**tensors, "text": text}, tmp_path / "whole.pt")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        starts = {
            info.filename: whole.index(archive.read(info), info.header_offset)
            for info in archive.infolist()
            if "/data/" in info.filename
        }
    rng = random.Random(0)
    in_data = [rng.randrange(start, start + 200) for start in starts.values() for _ in range(40)]
    elsewhere = [rng.randrange(len(whole)) for _ in range(300)]
    flips = [(position, rng.randrange(8)) for position in in_data + elsewhere]
    # The directory of the archive, which Python's reader looks at first.
    flips += [(len(whole) - 1 - back, bit) for back in range(100) for bit in range(8)]
    for position, bit in flips:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        for mapped in (False, True):
            try:
                read = read_file(path, mapped=mapped)
            except UsageError:
                continue
            assert position not in in_data
            assert read.pop("text") == text
            torch.testing.assert_close(read, tensors, rtol=0, atol=0)


def test_checksums_can_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the checksums of tensor data can be skipped. The rest is always compared."""
    path = save({"w": torch.zeros(1000)}, tmp_path / "flipped.pt")
    content = bytearray(path.read_bytes())
    content[content.index(bytes(400)) + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"damaged: Bad CRC-32 .*--skip-checksums"):
        read_file(path)
    assert read_file(path, verify=False)["w"].count_nonzero() == 1
    monkeypatch.setenv(SKIP_CHECKSUMS, "1")
    assert read_file(path)["w"].count_nonzero() == 1


# Fingerprints


def test_fingerprint_is_that_of_names_types_shapes_and_contents() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(True), "c": torch.tensor(2)}
    others = [
        {**tensors, "a": tensors["a"].view(2, 3)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {**tensors, "a": tensors["a"].index_fill(0, torch.tensor(5), -0.0)},
        {**tensors, "b": torch.tensor(False)},
        {**tensors, "d": torch.ones(1)},
        {"a": tensors["a"], "b": tensors["b"], "d": tensors["c"]},
        {"a": tensors["a"], "b": tensors["b"]},
    ]
    assert len({fingerprint(each) for each in (tensors, *others)}) == len(others) + 1
    reordered = {name: tensors[name].clone() for name in ("c", "b", "a")}
    strided = {**tensors, "a": torch.stack([tensors["a"], tensors["a"]], dim=1)[:, 0]}
    assert fingerprint(reordered) == fingerprint(strided) == fingerprint(tensors)
    exact = {fingerprint(each, is_not_averaged) for each in (tensors, others[0], others[2])}
    assert len(exact) == 1 and fingerprint(others[3], is_not_averaged) not in exact
