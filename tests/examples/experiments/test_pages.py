"""Filling the blocks between marker lines."""

from pathlib import Path

import pytest

from experiments.report import fill

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
    page.write_bytes(text.encode())
    return fill(page, lambda name, folder: f"of {name}")


def test_blocks_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    expected = PAGE.replace("old\n", "\nof main\n\n")
    expected = expected.replace("a.figure -->\n", "a.figure -->\n\nof a.figure\n\n")
    assert filled(tmp_path, PAGE) == expected
    assert filled(tmp_path, expected) == expected


def test_line_ends_stay(tmp_path: Path) -> None:
    page = "a\r\n<!-- report: x -->\r\nold\r\n<!-- end -->\r\nb\x0cc\u2028\r\n"
    lines = page.replace("old\r\n", "\r\nof x\r\n\r\n")
    assert filled(tmp_path, page) == lines
    assert filled(tmp_path, "a\n" + page) == "a\n" + lines
    assert filled(tmp_path, page.replace("\r", "")) == lines.replace("\r", "")
    unended = page.rstrip()
    assert filled(tmp_path, unended) == lines.rstrip()


def test_several_lines_have_the_line_ends_of_their_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_bytes(b"<!-- report: x -->\r\n<!-- end -->\r\n")
    expected = "<!-- report: x -->\r\n\r\n1\r\n2\r\n\r\n<!-- end -->\r\n"
    assert fill(page, lambda name, folder: "1\n2") == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a\nb\n", r"page\.md: has no block <!-- report: BLOCK -->$"),
        ("", r"page\.md: has no block"),
        ("<!--report: t-->\n", r"page\.md: has no block"),
        ("<!--report: t-->\n<!-- end -->\n", r"page\.md:2: <!-- end --> has no partner"),
        ("a\n<!-- report: x -->\nb\n", r"page\.md:2: <!-- report: x --> has no partner"),
        (
            "<!-- report: x -->\n<!-- report: y -->\n<!-- end -->\n",
            r"page\.md:1: <!-- report: x --> has no partner",
        ),
        ("a\nb\n<!-- end -->\n", r"page\.md:3: <!-- end --> has no partner"),
    ],
)
def test_wrong_markers(text: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=error):
        filled(tmp_path, text)


def test_a_page_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"none\.md: cannot be read"):
        fill(tmp_path / "none.md", lambda name, folder: name)
