"""Copy the code of a model into a folder, as modules that need nothing but PyTorch.

transformers copies the code of a folder into its cache, and imports it from there. It finds modules
by a regular expression for ``from .name import ...`` lines, and expects them all in one folder
(``transformers.dynamic_module_utils``). Nested packages and ``from . import name`` do not work.
Therefore:

- Each module becomes a file in one folder. ``memory/compute/tiles.py`` becomes
  ``memory_compute_tiles.py``, and a package's ``__init__.py`` has the name of the package.
- Relative imports are rewritten. Everything else stays as it is.
- A file that transformers loads ends in a list of all modules that it needs, which never runs.
- Only modules that the given ones need are copied. ``selectors/__init__.py``, which imports every
  file of its folder, becomes imports of the selectors that the model has.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

from ..memory import Selector

ROOT = Path(__file__).parents[1]
HEADER = "# {source}, MIT licence: https://opensource.org/license/mit\n"
IMPORT = re.compile(r"^( *)from (\.+)([\w.]*) import (.*)$", re.MULTILINE)
OUTSIDE = re.compile(r"^import (triton.*)$", re.MULTILINE)
REPLACED = {"memory.compute.kernels": "export.no_kernels"}
"""Module -> the module that takes its place."""
NAMESPACE = 'NAMESPACE = "fairseq_sffn"'
"""Line that names PyTorch operators. Two copies of the code must not register the same names."""
OWN_NAMESPACE = 'NAMESPACE = "sffn_" + format(zlib.crc32(__name__.encode()), "x")'
LISTED = "if False:  # transformers 4 copies only the modules that this file names"
PREFIXES = ("export.hugging_face.", "export.")
"""Prefixes that the names of files leave out."""


def copy_modules(modules: Sequence[str], selectors: Sequence[str], folder: Path) -> list[str]:
    """Copy modules and what they import.

    Args:
        modules: names of the modules within the package, such as ``export.decoder``.
        selectors: names of the selectors that the model has.
        folder: where to write.

    Returns:
        The names of the files.
    """
    sources = flat_sources(modules, selectors)
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    return list(sources)


def flat_sources(modules: Sequence[str], selectors: Sequence[str]) -> dict[str, str]:
    """Return name of each file -> its text; see :func:`copy_modules`."""
    found: dict[str, str] = {}
    for module in modules:
        texts = with_imports(module, selectors)
        name = flat_name(module)
        others = sorted(other for other in texts if other != name)
        lines = [f"    from .{other} import __doc__ as _" for other in others]
        texts[name] += "\n".join(["", LISTED, *lines, ""]) if others else ""
        found |= {f"{name}.py": text for name, text in texts.items()}
    return dict(sorted(found.items()))


def with_imports(module: str, selectors: Sequence[str]) -> dict[str, str]:
    """Return the flat names of a module and of all that it needs -> their texts."""
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        module = todo.pop()
        if flat_name(module) in found:
            continue
        source = REPLACED.get(module, module)
        text, needed = rewrite(source, selectors)
        header = HEADER.format(source=path_of(source).relative_to(ROOT.parent).as_posix())
        found[flat_name(module)] = header + text
        todo += needed
    return found


def path_of(module: str) -> Path:
    """Return the file of a module of the package."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def flat_name(module: str) -> str:
    """Return the name that a module has in a folder."""
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    return module.replace(".", "_")


def rewrite(module: str, selectors: Sequence[str]) -> tuple[str, list[str]]:
    """Return the text of a module with its relative imports rewritten.

    Args:
        module: name of the module.
        selectors: names of the selectors that the model has.

    Returns:
        The text, and the names of the modules that it imports.
    """
    if module == "memory.selectors":
        return selector_imports(selectors)
    path = path_of(module)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    needed: list[str] = []

    def replace(match: re.Match[str]) -> str:
        indent, dots, name, imported = match.groups()
        base = package[: len(package) - len(dots) + 1]
        if name:
            target = ".".join([*base, *name.split(".")])
            needed.append(target)
            return f"{indent}from .{flat_name(target)} import {imported}"
        lines = []
        for item in imported.partition("#")[0].split(","):
            target = ".".join([*base, item.strip()])
            needed.append(target)
            flat = flat_name(target)
            # transformers does not see the second line, and copies the module because of the first.
            lines += [
                f"from .{flat} import __doc__ as _",
                f"from . import {flat} as {item.strip()}",
            ]
        return "\n".join(indent + line for line in lines)

    text = IMPORT.sub(replace, path.read_text(encoding="utf-8"))
    # transformers demands what is imported outside of try, even if no function of it is called.
    text = OUTSIDE.sub(r"try:\n    import \1\nexcept ImportError:\n    raise", text)
    if NAMESPACE in text:
        text = text.replace(NAMESPACE, OWN_NAMESPACE)
        text = text.replace("import importlib.util\n", "import importlib.util\nimport zlib\n", 1)
    ast.parse(text)  # what was written is Python
    return text, needed


def selector_imports(selectors: Sequence[str]) -> tuple[str, list[str]]:
    """Return the text of a module that imports selectors, and the names of their modules."""
    lines = ['"""The selectors of this model."""', ""]
    needed = []
    for name in sorted(set(selectors)):
        cls = Selector.registry[name]
        module = "memory.selectors." + cls.__module__.rpartition(".")[2]
        needed.append(module)
        lines.append(f"from .{flat_name(module)} import {cls.__name__}  # noqa: F401")
    return "\n".join(lines) + "\n", needed
