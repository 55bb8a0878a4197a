"""Files of tensors: what is written is read, and damage is one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fairseq_sffn.errors import UsageError
from fairseq_sffn.export.tensor_files import (
    INDEX,
    SINGLE,
    library,
    load_file,
    load_model,
    parse_size,
    save_file,
    save_model,
)

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def tensors() -> dict[str, Tensor]:
    result = {str(dtype): torch.arange(24).view(2, 3, 4).to(dtype) for dtype in DTYPES}
    result["torch.float32"][0, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return result | {
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "t": torch.rand(3, 2).t(),
    }


def same_bits(left: Tensor, right: Tensor) -> bool:
    bytes_of = [each.contiguous().reshape(-1).view(torch.uint8) for each in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bytes_of)


@pytest.mark.parametrize("size", [1, 200, 10**9])
def test_round_trip(tmp_path: Path, size: int) -> None:
    written = tensors()
    files = save_model(written, tmp_path, size)
    found = load_model(tmp_path)
    assert found.keys() == written.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in written.items())
    assert (tmp_path / SINGLE).exists() == (size == 10**9)
    if size == 200:
        assert 1 < len(files) < len(written)
        index = json.loads((tmp_path / INDEX).read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
        for file in files:
            shard = dict(load_file(tmp_path / file))
            assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= size
            assert {index["weight_map"][name] for name in shard} == {file}


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    table = torch.rand(4, 2)
    save_file({"all": table, "same": table, "part": table[:2]}, tmp_path / SINGLE)
    found = load_model(tmp_path)
    assert torch.equal(found["all"], table) and torch.equal(found["part"], table[:2])


GOOD = {"a": torch.zeros(2)}


@pytest.mark.parametrize("keep", [0, 5, -1, None])
def test_damage(tmp_path: Path, keep: int | None) -> None:
    save_file(GOOD, tmp_path / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content + b"0" if keep is None else content[:keep])
    with pytest.raises(UsageError, match="damaged, or not a safetensors file") as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match="safetensors is not installed: pip install"):
        library()


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{}", "has no weight_map"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not in this folder"),
        ('{"weight_map": {"b": "model.safetensors"}}', "b is in no file"),
        ('{"weight_map": {"a": "other.safetensors"}}', "cannot be read"),
    ],
)
def test_wrong_index(tmp_path: Path, index: str, reason: str) -> None:
    save_file(GOOD, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(UsageError, match=reason):
        load_model(tmp_path)


def test_sizes() -> None:
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("300mb") == 3 * 10**8
    assert parse_size("2KiB") == 2048
    assert parse_size("17") == 17
    for text in ("", "0", "-1", "5 GB", "GB", "1.5GB"):
        with pytest.raises(UsageError, match="--max-shard-size"):
            parse_size(text)
