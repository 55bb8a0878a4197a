"""Statistics of a model's routing, against loops over sentences."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_sffn.tools import routing
from fairseq_sffn.tools.routing import Routing
from tests.models.small_lm import dictionary, pad, random_tokens, small_lm

LENGTHS = ((7, 4, 7), (3, 9))
"""Lengths of the sentences of each batch."""


def watched(model: Any, batches: list[list[Tensor]]) -> dict[str, Any]:
    """Return the statistics of both layers."""
    count = sum(len(row) for rows in batches for row in rows)
    with torch.no_grad(), Routing(model, dictionary(), count) as seen:
        for rows in batches:
            tokens_BT = pad(rows)
            seen.tokens(tokens_BT)
            model(tokens_BT)
    return seen.report()


def alone(model: Any, row: Tensor) -> list[list[int]]:
    """Return the blocks that the second layer selects for each token of a sentence."""
    found = []
    memory = model.decoder.layers[1].fc1.memory
    handle = memory.register_forward_hook(lambda m, args, out: found.append(out.selection.blocks))
    with torch.no_grad():
        model(row[None])
    handle.remove()
    return found[0].tolist()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("avgk", {}),
        ("avgk", {"sffn_shared_blocks": 2}),
        ("switch", {}),
        ("rand_hash", {}),
        ("mixed", {}),
    ],
)
def test_routing(method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "POSITIONS", 12)
    model = small_lm(method, **options).eval()
    batches = [[random_tokens(length) for length in lengths] for lengths in LENGTHS]
    found = watched(model, batches)["1"]

    pairs: Counter[tuple[int, int]] = Counter()
    uses = []  # in the order of layers, which have time first
    for rows in batches:
        blocks = [alone(model, row) for row in rows]
        for time in range(max(map(len, rows))):
            for row, of_row in zip(rows, blocks, strict=True):
                if time < len(row):
                    uses.append((time, int(row[time]), of_row[time]))
                    pairs.update((block, int(row[time])) for block in of_row[time])
    by_block: Counter[int] = Counter()
    by_token: Counter[int] = Counter()
    for (block, token), count in pairs.items():
        by_block[block] += count
        by_token[token] += count
    total = pairs.total()
    counts = found["counts"]
    memory = model.memory_configs["layer1"]
    assert counts == [by_block[block] for block in range(memory.routed_blocks)]
    entropy = -sum(n / total * math.log2(n / total) for n in by_block.values())
    assert found["block_bits"] == pytest.approx(entropy, abs=1e-4)
    mutual = sum(
        n / total * math.log2(n * total / (by_block[block] * by_token[token]))
        for (block, token), n in pairs.items()
    )
    assert found["token_bits"] == pytest.approx(mutual, abs=1e-4)
    for block, tokens in enumerate(found["top_tokens"]):
        surplus = {
            dictionary()[token]: pairs[block, token] - by_block[block] * by_token[token] / total
            for token in range(len(dictionary()))
        }
        best = sorted((s for s in surplus.values() if s > 0), reverse=True)[: routing.TOP]
        assert [surplus[token] for token in tokens] == pytest.approx(best)

    drawn = list(zip(found["positions"], found["blocks"], strict=True))
    assert len(drawn) == 12
    left = iter(uses)  # each is there once, in order
    times = [next(time for time, *use in left if use == [token, of]) for token, of in drawn]
    assert max(times) > 4


def test_all_positions_are_kept_where_they_are_few_and_the_same_for_all_models() -> None:
    rows = [random_tokens(5), random_tokens(3)]
    found = [watched(small_lm(method).eval(), [rows])["1"] for method in ("avgk", "switch")]
    assert found[0]["positions"] == found[1]["positions"]
    assert sorted(found[0]["positions"]) == sorted(torch.cat(rows).tolist())


def test_what_is_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MOST_KEPT", 1)
    monkeypatch.setattr(routing, "MOST_LISTED", 1)
    model = small_lm("rand_hash").eval()
    found = watched(model, [[random_tokens(5)]])["1"]
    assert found["blocks"] == found["positions"] == found["top_tokens"] == []
    assert sum(found["counts"]) == 5 * model.memory_configs["layer1"].active_blocks
    rows = [[random_tokens(5)]]
    counted = watched(model, rows)["1"]
    monkeypatch.setattr(routing, "MOST_PAIRS", len(counted["counts"]) * len(dictionary()) - 1)
    assert watched(model, rows)["1"] == {**counted, "token_bits": None}


def test_a_model_without_sparse_layers() -> None:
    assert watched(small_lm("dense").eval(), [[random_tokens(5)]]) == {}
