"""Layers of other libraries, whether or not they are installed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from torch import nn

from tests.examples.benchmark.figures import check_figures


def test_peers_that_are_not_there_or_fail_are_told(scripts: dict[str, ModuleType]) -> None:
    peers = scripts["peers"]

    def linear(width: int, cells: int) -> tuple[nn.Module, Any, int]:
        layer = nn.Linear(width, width)
        return layer, layer, cells

    def fails(width: int, cells: int) -> tuple[nn.Module, Any, int]:
        raise ImportError("no such name\nin it")

    absent, works, broken = peers.measure(
        16,
        8,
        2,
        (
            peers.Peer("product-key-memory", "PKM", linear, ""),
            peers.Peer("torch", "Linear", linear, ""),
            peers.Peer("torch", "Nothing", fails, ""),
        ),
    )
    assert absent["error"] == "not installable" and absent["version"]
    check_figures(works)
    assert works["active_cells"] == works["dense_cells"] == 32
    assert broken["error"] == "ImportError: no such name"


def test_peers_are_pinned(scripts: dict[str, ModuleType]) -> None:
    peers = scripts["peers"]
    wanted = peers.wanted_versions(peers.REQUIREMENTS.read_text())
    assert {peer.package for peer in peers.PEERS} <= set(wanted)


@pytest.mark.parametrize(("cells", "experts", "units"), [(1024, 1, 680), (1024, 2, 344)])
def test_gated_experts_have_the_active_size(
    scripts: dict[str, ModuleType], cells: int, experts: int, units: int
) -> None:
    assert scripts["peers"].gated_width(cells, experts) == units
    assert abs(units * experts * 1.5 - cells) < 0.02 * cells
