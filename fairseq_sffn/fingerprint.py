"""A fingerprint of the code that trains, which ranks and stored results compare."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGES = (*("memory", "models", "criterions", "tasks", "optim", "expert_parallel", "patches"),)
"""Packages whose code determines the numbers of a training."""


def code_fingerprint(root: Path = Path(__file__).parent) -> str:
    """Return a short hash of the names and contents of the sources in ``PACKAGES``.

    Args:
        root: the folder of the package ``fairseq_sffn``.
    """
    digest = hashlib.sha256()
    sources = (
        path
        for package in PACKAGES
        for kind in ("*.py", "*.cpp")
        for path in (root / package).rglob(kind)
    )
    for path in sorted(sources):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
