"""What the runner makes of processes and files."""

import json
from pathlib import Path

import pytest
import torch
from study import made

from fairseq_sffn.study.runner import drop_optimizer, fingerprint, last_json


def test_json_after_other_lines() -> None:
    found = {"tasks": [{"a": 1}, {"b": {"c": 2}}]}
    for text in (json.dumps(found), json.dumps(found, indent=2)):
        assert last_json(f"a library was here\n{text}\n") == found


def test_only_the_last_model_is_kept(tmp_path: Path) -> None:
    last = tmp_path / "checkpoint_last.pt"
    state = {"model": {"w": torch.ones(2)}, "last_optimizer_state": {"m": torch.ones(9)}}
    for name in ("checkpoint_best.pt", "checkpoint_1_5.pt", last.name):
        torch.save(state, tmp_path / name)
    drop_optimizer(last)
    assert [path.name for path in tmp_path.glob("*")] == [last.name]
    kept = torch.load(last, weights_only=True)
    assert kept["last_optimizer_state"] is None and kept["model"]["w"].tolist() == [1, 1]


def test_the_fingerprint_is_of_all_texts(tmp_path: Path) -> None:
    paths = [tmp_path / "bin" / f"{split}.bin" for split in ("train", "valid", "test")]
    paths += [tmp_path / "domains" / name / "test.bin" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "bin" / "dict.txt").write_text("word 3\n")
    folders = {"data": str(tmp_path / "bin"), "domains": str(tmp_path / "domains")}
    scale = made.scale(**folders, dictionary=5)  # fairseq has four more
    seen = {fingerprint(scale)}
    for path in paths:
        path.write_text("another")
        seen.add(fingerprint(scale))
    assert len(seen) == 1 + len(paths)
    with pytest.raises(SystemExit, match=r"dictionary 6 of scale made: .*dict\.txt has 5 types"):
        fingerprint(made.scale(**folders, dictionary=6))
    paths[-1].unlink()
    with pytest.raises(SystemExit, match=r"b/test\.bin: is missing"):
        fingerprint(scale)
    with pytest.raises(SystemExit, match="none: there is no such folder"):
        fingerprint(made.scale(**{**folders, "domains": str(tmp_path / "none")}))
