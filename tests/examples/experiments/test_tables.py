"""The values and cells of tables."""

from __future__ import annotations

import pytest

from experiments.tables.part import Part
from experiments.tables.part import text as escaped
from experiments.tables.routing import token_share
from experiments.tables.zero_shot import Task


def test_a_tokens_blocks_do_not_tell_which_of_them_a_use_is() -> None:
    """Ids that determine 8 of 128 blocks tell 4 of the 7 bits of a use."""
    assert token_share({"block_bits": 7.0, "token_bits": 4.0}, 8) == 1.0
    assert token_share({"block_bits": 7.0, "token_bits": 3.5}, 1) == 0.5
    assert token_share({"block_bits": 3.0, "token_bits": 0.0}, 8) is None


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
@pytest.mark.parametrize("error", [None, 0.0, 0.5])
def test_apart_from_random(
    accuracy: float, random: float, apart: bool, error: float | None
) -> None:
    assert Task(500, accuracy, error, random).apart is apart


def test_a_label_with_a_line_end_stays_in_its_row() -> None:
    assert escaped("a\nb\r\n|c*") == "a b \\|c\\*"
    assert Part({"a|b": escaped}, []).markdown() == "| a\\|b |\n| --- |"
