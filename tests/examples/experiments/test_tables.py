"""The values and cells of tables."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.tables.part import Part
from experiments.tables.part import text as escaped
from experiments.tables.routing import seed_agreement, token_share
from experiments.tables.zero_shot import apart as differ


def test_a_tokens_blocks_do_not_tell_which_of_them_a_use_is() -> None:
    """Ids that determine 8 of 128 blocks tell 4 of the 7 bits of a use."""
    assert token_share(7.0, 4.0, 8) == 1.0
    assert token_share(7.0, 3.5, 1) == 0.5
    assert token_share(3.0, 0.0, 8) is None
    assert token_share(7.0, None, 8) is None


def test_seeds_are_compared_on_the_same_positions() -> None:
    blocks = [[0], [1], [0], [1]]
    seeds = pd.DataFrame({"blocks": [blocks, blocks], "positions": [[5, 6, 5, 6]] * 2})
    assert seed_agreement(seeds) == "1.00"
    assert seed_agreement(seeds.assign(positions=[[5, 6, 5, 6], [6, 5, 5, 6]])) == ""


@pytest.mark.parametrize(
    ("accuracy", "random", "apart"),
    [
        (0.0, 0.0, False),
        (0.002, 0.0, True),
        (0.0, 0.001, False),  # its own standard error is 0
        (0.01, 0.001, True),
        (0.0, 0.25, True),
        (1.0, 0.25, True),
        (0.54, 0.5, False),  # 2 sqrt(0.25 / 500) is 0.0447
        (0.55, 0.5, True),
        (0.45, 0.5, True),
    ],
)
def test_apart_from_random(accuracy: float, random: float, apart: bool) -> None:
    found = differ(*(pd.Series([value]) for value in (accuracy, random, 500)))
    assert list(found) == [apart]


def test_a_label_with_a_line_end_stays_in_its_row() -> None:
    assert escaped("a\nb\r\n|c*") == "a b \\|c\\*"
    assert Part({"a|b": ["c"]}, [], left=["a|b"]).markdown() == "| a\\|b |\n| --- |\n| c |"
    assert Part({"a|b": []}, ["A note."]).markdown() == ""
