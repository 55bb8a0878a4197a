"""The examples of the memory's README run as written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fairseq_sffn.memory
from fairseq_sffn.memory import Selector, SelectorInput
from fairseq_sffn.memory.compute import ENGINES

README = Path(fairseq_sffn.memory.__file__).with_name("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run_examples() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": __name__}
    for block in BLOCKS:
        exec(block, namespace)
    return namespace


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the example selector afterwards."""
    monkeypatch.setattr(Selector, "registry", dict(Selector.registry))


def test_the_examples_run(capsys: pytest.CaptureFixture[str], registry: None) -> None:
    namespace = run_examples()
    printed = capsys.readouterr().out
    assert "torch.Size([8, 128, 256]) torch.Size([1024, 16]) tensor(16384)" in printed
    assert str(2 * 16384 * 256 + 16384 + 256) in printed
    assert Selector.registry["cosine_k"] is namespace["CosineK"]


def test_the_example_selects_by_angle(registry: None) -> None:
    namespace = run_examples()
    memory = namespace["SparseMemory"](namespace["config"])
    x = torch.randn(5, 256)
    selected = memory.selector(SelectorInput(x, memory.keys))
    mean_keys = memory.keys.unflatten(0, (-1, 64)).mean(dim=1)
    cosines = torch.cosine_similarity(x.unsqueeze(1), mean_keys, dim=2)
    torch.testing.assert_close(selected.scores.logits, cosines / 0.5, rtol=1e-4, atol=1e-5)


def test_the_table_has_every_attribute_of_a_selector() -> None:
    """``name``, ``flag_prefix``, ``Config`` and ``forward`` are in the example."""
    section = README.split("## Add a selection method")[1].split("## Engines")[0]
    rows = re.findall(r"^\| `(\w+)(\(\w+\))?` \| (.*?) \| .* \| .* \|$", section, re.M)
    shown = {"registry", "name", "flag_prefix", "Config", "forward"}
    members = {*vars(Selector), *Selector.__annotations__} - shown
    assert {name for name, *_ in rows} == {each for each in members if not each.startswith("_")}
    for name, parameters, default in rows:
        value = getattr(Selector, name)
        assert bool(parameters) == callable(value)
        assert callable(value) or eval(default.strip("`")) == value


def test_the_table_has_every_engine_and_the_text_every_selector() -> None:
    assert re.findall(r"^\| `(\w+)` \| .* \| .* \|$", README.split("## Engines")[1], re.M) == [
        *("native_loop", "loop", "native_embedding_bag", "embedding_bag"),
        *("tiled", "masked", "grouped"),
    ]
    assert all(f"`{name}`" in README for name in (*ENGINES, *Selector.registry))
