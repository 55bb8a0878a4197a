"""Files of tensors: what is written is read, and damage is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fairseq_sffn.errors import UsageError
from fairseq_sffn.export.tensor_files import (
    DTYPES,
    INDEX,
    SINGLE,
    load_file,
    load_model,
    parse_size,
    save_file,
    save_model,
)


def tensors() -> dict[str, Tensor]:
    result = {
        name: torch.arange(24).view(2, 3, 4).to(dtype) for name, dtype in sorted(DTYPES.items())
    }
    result["F32"][0, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
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


def test_the_header_is_that_of_the_format(tmp_path: Path) -> None:
    save_file(
        {"a": torch.tensor([1.0]), "b": torch.tensor([[2]], dtype=torch.int8)}, tmp_path / "f"
    )
    data = (tmp_path / "f").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "I8", "shape": [1, 1], "data_offsets": [4, 5]},
    }
    assert data[8 + length :] == b"\x00\x00\x80\x3f\x02"


def header(entry: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"\xff" * 20, "its header is longer than the file"),
        (header(GOOD, b"\0" * 7), "it ends before a"),
        (header(GOOD, b"\0" * 9), "bytes that belong to no tensor"),
        (header({**GOOD, "shape": [3]}), "a is not where"),
        (header({**GOOD, "shape": [-2]}), "a has no size"),
        (header({**GOOD, "data_offsets": [4, 12]}), "a is not where"),
        (header({**GOOD, "data_offsets": [0]}), "damaged"),
        (header({**GOOD, "dtype": "F4"}), "damaged"),
        (header([]), "damaged"),
        ((2).to_bytes(8, "little") + b"[]", "damaged"),
    ],
)
def test_damage(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UsageError, match=reason) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_good_content_is_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(header(GOOD))
    assert torch.equal(load_model(tmp_path)["a"], torch.zeros(2))


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
    (tmp_path / SINGLE).write_bytes(header(GOOD))
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
