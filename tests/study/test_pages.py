"""Blocks between marker lines."""

from pathlib import Path

import pytest

from fairseq_sffn.study.pages import fill

PAGE = """# Title
<!-- report: main -->
old
<!-- end -->
text <!-- report: main --> in a line
<!-- report: a.figure -->
<!-- end -->
last
"""


def filled(tmp_path: Path, text: str) -> str:
    page = tmp_path / "page.md"
    page.write_text(text)
    return fill(page, lambda name: f"of {name}")


def test_blocks_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    expected = PAGE.replace("old\n", "\nof main\n\n")
    expected = expected.replace("a.figure -->\n", "a.figure -->\n\nof a.figure\n\n")
    assert filled(tmp_path, PAGE) == expected
    assert filled(tmp_path, expected) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a\n<!-- report: x -->\nb\n", r"page\.md:2: this block has no <!-- end -->"),
        (
            "<!-- report: x -->\n<!-- report: y -->\n<!-- end -->\n",
            r"page\.md:1: this block has no <!-- end -->",
        ),
        ("a\nb\n<!-- end -->\n", r"page\.md:3: <!-- end --> ends no block"),
    ],
)
def test_markers_without_an_end(text: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=error):
        filled(tmp_path, text)


def test_a_page_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"none\.md: cannot be read"):
        fill(tmp_path / "none.md", str)
