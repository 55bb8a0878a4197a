"""Declaration and application of changes of fairseq's own code.

A module of this package declares each of its changes once::

    @patch(
        "fairseq.checkpoint_utils:verify_checkpoint_directory",
        why="fairseq ends in a traceback if --save-dir cannot be written to.",
        until="fairseq names the flag and the reason.",
        kind=MENDS_FAIRSEQ,
        written_for=("1f0c2a9d",),
    )
    def verify_checkpoint_directory(original):
        @functools.wraps(original)
        def wrapper(save_dir):
            ...
            original(save_dir)

        return wrapper

A target has only one patch. The order in which patches are applied therefore does not matter. The
module must be in ``MODULES`` of this package's ``__init__.py``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

Kind = Literal["the plugin needs it", "mends fairseq"]
NEEDED: Kind = "the plugin needs it"
MENDS_FAIRSEQ: Kind = "mends fairseq"
MARK = "fairseq_sffn_patch"
"""Attribute of a replacement that names its target."""
ORIGINAL = "fairseq_sffn_original"
"""Attribute of a replacement that holds the original."""
MISSING = "missing"
"""Fingerprint of a target that does not exist."""
WRITTEN_FOR = "ve-fairseq 0.12.3"
"""The distribution of fairseq for which the patches name fingerprints."""


@dataclass(frozen=True)
class Patch:
    """A change of one function, method or class of fairseq.

    Attributes:
        target: ``module:name`` or ``module:Class.name``.
        replace: takes the original, or ``None`` if the target is missing, and returns the
            replacement. It returns the original itself to change nothing.
        why: what fails without the patch.
        until: condition under which the patch can be removed.
        kind: whether the plugin needs the patch, or it mends fairseq for every model.
        written_for: fingerprints of the originals for which it was written; see
            :func:`fingerprint`.
        members: for a class, the names of the members that the fingerprint covers.
    """

    target: str
    replace: Callable[[Any], Any]
    why: str
    until: str
    kind: Kind
    written_for: tuple[str, ...]
    members: tuple[str, ...] = ()

    def owner(self) -> tuple[Any, str]:
        """Return the module or class that has the target as an attribute, and its name there."""
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        return owner, name

    def current(self) -> Any:
        """Return the target's current value; ``None``: it is missing."""
        owner, name = self.owner()
        return getattr(owner, name, None)

    def original(self) -> Any:
        """Return fairseq's own value of the target; ``None``: it is missing without the patch."""
        current = self.current()
        return getattr(current, ORIGINAL) if self.is_applied() else current

    def is_applied(self) -> bool:
        """Return whether the target has been replaced."""
        return getattr(self.current(), "__dict__", {}).get(MARK) == self.target

    def found(self) -> str | None:
        """Return the fingerprint of the original; ``None``: there is no source."""
        return fingerprint(self.owner()[0] if self.members else self.original(), self.members)

    def fits(self) -> bool:
        """Return whether the patch was written for the original.

        An original without source counts as such.
        """
        return self.found() in (None, *self.written_for)

    def apply(self) -> None:
        """Replace the target, unless it has been replaced already.

        The function logs a warning if the patch was not written for the original. It also logs a
        warning, and does nothing, if the target is unexpectedly missing.
        """
        if self.is_applied():
            return
        owner, name = self.owner()
        original = self.current()
        if original is None and MISSING not in self.written_for:
            logger.warning(f"{self.target}: is not there; see fairseq-sffn patches")
            return
        replacement = self.replace(original)
        if replacement is original:
            return
        if not self.fits():
            logger.warning(
                f"{self.target}: its source ({self.found()}) is not that of the fairseq that the "
                f"plugin was written for ({WRITTEN_FOR}); see fairseq-sffn patches"
            )
        setattr(replacement, MARK, self.target)
        setattr(replacement, ORIGINAL, original)
        is_static = isinstance(inspect.getattr_static(owner, name, None), staticmethod)
        setattr(owner, name, staticmethod(replacement) if is_static else replacement)
        # ``python -m fairseq_cli.train`` runs a second copy of the module.
        command = sys.modules.get("__main__")
        spec = getattr(command, "__spec__", None)
        if isinstance(owner, types.ModuleType) and getattr(spec, "name", None) == owner.__name__:
            setattr(command, name, replacement)


def patch(
    target: str,
    *,
    why: str,
    until: str,
    kind: Kind,
    written_for: Iterable[str],
    members: Iterable[str] = (),
) -> Callable[[Callable[[Any], Any]], Patch]:
    """Return a decorator that makes a :class:`Patch` of a function that wraps the original.

    Args:
        target, why, until, kind, written_for, members: see :class:`Patch`.
    """

    def declare(replace: Callable[[Any], Any]) -> Patch:
        return Patch(target, replace, why, until, kind, tuple(written_for), tuple(members))

    return declare


def fingerprint(original: Any, members: Iterable[str] = ()) -> str | None:
    """Return a short hash of the source of a function, or of some members of a class.

    White space does not count.

    Args:
        original: the function or class; ``None``: it is missing.
        members: for a class, the names of the members that count.

    Returns:
        The hash, or ``MISSING``; ``None``: there is no source.
    """
    if original is None:
        return MISSING
    parts = [getattr(original, name) for name in members] or [original]
    digest = hashlib.sha256()
    for part in parts:
        source: Any = getattr(part, "fget", part)  # the function of a property
        try:
            digest.update("".join(inspect.getsource(source).split()).encode())
        except (OSError, TypeError):
            return None
    return digest.hexdigest()[:8]
