"""The layers of packages: each package imports only packages below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fairseq_sffn

ROOT = Path(fairseq_sffn.__file__).parent
LAYERS = (
    ("memory", "errors", "versions", "fingerprint"),
    ("precision", "ranks"),
    ("models",),
    ("options",),
    ("criterions", "optim", "tasks"),
    ("checkpoints",),
    ("expert_parallel",),
    ("patches",),
    ("plugin",),
    ("export",),
    ("tools",),
    ("__main__",),
)
"""Layers from the lowest. Packages of one layer do not import each other."""
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FAIRSEQ = {"fairseq", "fairseq_cli", "fairscale", "hydra", "omegaconf"}
WITHOUT_FAIRSEQ = ("memory", "errors", "versions", "fingerprint")


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute names that a file of the package imports."""
    package = ["fairseq_sffn", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, each.name]) for each in node.names)


def unit(path: Path) -> str:
    """Return the package, or top-level module, that a file belongs to."""
    first, *_ = path.relative_to(ROOT).with_suffix("").parts
    return first


FILES = sorted(path for path in ROOT.rglob("*.py") if unit(path) != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_is_below(path: Path) -> None:
    own = unit(path)
    assert own in LAYER, f"{own} has no layer"
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert not (own in WITHOUT_FAIRSEQ and top in FAIRSEQ), name
        if top != "fairseq_sffn":
            continue
        other = rest.partition(".")[0]
        if other != own:
            assert LAYER[other] < LAYER[own], name
