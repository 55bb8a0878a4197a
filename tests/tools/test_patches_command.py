"""``fairseq-sffn patches``."""

import json

import pytest

from fairseq_sffn.patches import PATCHES
from fairseq_sffn.tools import patches
from tests import commands


def test_every_patch_is_listed() -> None:
    rows = json.loads(commands.sffn("patches", "--json"))
    assert [row["target"] for row in rows] == sorted(each.target for each in PATCHES)
    assert all(row["fits"] for row in rows)
    assert all(row["module"].startswith("fairseq_sffn.patches.") for row in rows)
    table = commands.sffn("patches")
    for row in rows:
        assert f"{row['target']}\n  {row['kind']}; {row['module']}\n  why: " in table
    assert f"{len(PATCHES)} of {len(PATCHES)} targets are as in ve-fairseq 0.12.3" in table
    assert max(map(len, table.splitlines())) <= 100


def test_another_fairseq_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**patches.as_row(PATCHES[0]), "fits": False, "fingerprint": "01234567"}
    table = patches.format_rows([row])
    assert "its source (01234567) is not that of ve-fairseq 0.12.3" in table
    assert "0 of 1 targets" in table
