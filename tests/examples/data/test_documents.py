"""The list of sources, the laptop corpus's manifest, and the README's tables of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

from tests.examples.data.made import SCRIPTS


def test_sources_are_complete(data: SimpleNamespace) -> None:
    sources = json.loads((SCRIPTS / "sources.json").read_text())
    assert len({source["name"] for source in sources}) == len(sources)
    for source in sources:
        assert source["reader"] in data.readers.READERS
        assert source["role"] in ("train", "domain")
        assert source["files"]
        assert source["licence"]
        assert ("version" in source) == (source["registry"] in ("npm", "pypi"))
    assert sum(source["role"] == "domain" for source in sources) >= 10


def test_readme_has_the_figures_of_the_manifest(data: SimpleNamespace) -> None:
    manifest = json.loads((SCRIPTS / "laptop-manifest.json").read_text())
    readme = (SCRIPTS / "README.md").read_text()
    for table in (data.tables.sources_table, data.tables.splits_table, data.tables.train_table):
        assert table(manifest) in readme
    sources = json.loads((SCRIPTS / "sources.json").read_text())
    assert [source["name"] for source in sources] == list(manifest["sources"])
    assert [s["licence"] for s in sources] == [s["licence"] for s in manifest["sources"].values()]
    expected = data.laptop.SETTINGS
    assert data.corpus.Settings(**manifest["settings"]) == expected
