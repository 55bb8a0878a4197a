"""Documents and paragraphs that several sources have."""

from __future__ import annotations

from types import SimpleNamespace

from tests.examples.data.made import make_text


def test_copies_are_dropped_over_all_sources(data: SimpleNamespace) -> None:
    first, second, third = (make_text(i) for i in range(3))
    shared = first.split("\n")[0]
    near = first.replace(first.split("\n")[2], "Something else is said here, by someone else.")
    seen = data.deduplicate.Deduplicator()

    kept, dropped = seen.documents([("1", f"Notes\n{first}"), ("2", f"Notes\n{second}")], 200)
    assert kept == [("1", f"Notes\n{first}"), ("2", f"Notes\n{second}")]  # "Notes" is short
    assert dropped == {"copies": 0, "short_without_copied_paragraphs": 0, "paragraphs_copied": 0}

    other = [
        ("near", near),
        ("same paragraph", f"{shared.upper()}\n{third}"),
        ("little else", f"{shared}\n{make_text(9, paragraphs=2)[:150]}"),
    ]
    kept, dropped = seen.documents(other, 200)
    assert kept == [("same paragraph", third)]
    assert dropped == {"copies": 1, "short_without_copied_paragraphs": 1, "paragraphs_copied": 2}
