"""Copied code: transformers would find all of it, and it runs without the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_sffn.export.description import describe
from fairseq_sffn.export.vendoring import copy_modules, flat_sources
from fairseq_sffn.memory import Selector
from fairseq_sffn.tools.export import MODULES, TOKENIZER_MODULE, exported_tensors
from tests.export.exported import config_of, pair
from tests.models.small_lm import random_tokens

RUN = """
import json, sys, torch
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import first.decoder, second.decoder  # two copies in one process
description = json.load(open(sys.argv[1] + "/description.json"))
stored = torch.load(sys.argv[1] + "/stored.pt")
for module in (first.decoder, second.decoder):
    decoder = module.Decoder(SimpleNamespace(**description)).double().eval()
    decoder.load_state_dict(stored["tensors"])
    found = decoder.logits(decoder(stored["ids"]).features)
    torch.testing.assert_close(found, stored["logits"], rtol=1e-10, atol=1e-10)
    products = sys.modules[module.__name__.replace("decoder", "memory_compute_tiled_products")]
    print(products.NAMESPACE)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"fairseq", "fairseq_sffn", "omegaconf", "transformers"}, loaded
"""


def test_transformers_finds_every_module() -> None:
    """By its regular expressions (transformers.dynamic_module_utils.get_relative_imports)."""
    sources = flat_sources([*MODULES, TOKENIZER_MODULE], list(Selector.registry))
    found = {"modeling_sffn.py", "tokenization_sffn.py"}
    todo = list(found)
    while todo:
        text = sources[todo.pop()]
        names = re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)
        assert not re.findall(r"^\s*import\s+\.", text, flags=re.MULTILINE)
        new = {f"{name}.py" for name in names} - found
        found |= new
        todo += new
    assert found == set(sources)
    # It demands the packages that a module imports outside of try.
    outside = {
        match.partition(".")[0]
        for text in sources.values()
        for match in re.findall(r"^(?:import|from) ([a-z]\w*)", text, flags=re.MULTILINE)
    }
    assert outside - set(sys.stdlib_module_names) == {"torch", "numpy", "transformers"}
    assert not any("fairseq_sffn import" in text for text in sources.values())


@pytest.mark.parametrize("module", [*MODULES, TOKENIZER_MODULE])
def test_transformers_4_finds_every_module_in_the_loaded_file(module: str) -> None:
    """It does not look into the modules that the file imports."""
    sources = flat_sources([module], ["avgk"])
    name = module.rpartition(".")[2] + ".py"
    names = re.findall(r"^\s*from\s+\.(\S+)\s+import", sources[name], flags=re.MULTILINE)
    assert {f"{found}.py" for found in names} == set(sources) - {name}


def test_only_the_selectors_of_the_model() -> None:
    files = flat_sources(["export.decoder"], ["avgk", "hash_layer"])
    selectors = {name for name in files if name.startswith("memory_selectors_")}
    names = ("avgk", "hash_layer", "mean_keys")
    assert selectors == {f"memory_selectors_{name}.py" for name in names}
    assert "C++ kernels in an exported folder" in files["memory_compute_kernels.py"]


def test_copies_compute_alike(tmp_path: Path) -> None:
    model, _ = pair("mixed")
    description = describe(model, type(model).options(config_of("mixed")))
    selectors = [memory["selector"] for memory in description["memories"].values()]
    for copy in ("first", "second"):
        (tmp_path / copy).mkdir()
        copy_modules(["export.decoder"], selectors, tmp_path / copy)
    (tmp_path / "description.json").write_text(json.dumps(description))
    ids = random_tokens(2, 9)
    tensors = exported_tensors(model, model.state_dict(), tied=True)
    names = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        stored = {"tensors": names, "ids": ids, "logits": model(ids)[0]}
    torch.save(stored, tmp_path / "stored.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", RUN, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(set(done.stdout.split())) == 2  # names of operators
