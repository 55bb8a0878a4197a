"""Print the page of all flags, in Markdown."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, get_args

from ..checkpoints import loading
from ..criterions.routing_losses import RoutingLossConfig
from ..errors import flag
from ..memory import Selector
from ..models.config import GatedOptions, SparseOptions, selector_flags
from ..models.transformer_lm import METHODS
from ..options import waiting
from ..tasks.sffn_language_modeling import SFFNLanguageModelingConfig

INTRODUCTION = """\
# Flags

`fairseq-sffn flags` prints this page from the options in the code. fairseq's own flags work as
well. A flag on the command line always overrides a default. Where a default is on, a flag turns it
off: `--no-share-decoder-input-output-embed`, `--no-decoder-normalize-before`. A model refuses the
flags of other selectors.
"""

MODELS = """\
For every architecture with sparse layers, in `fairseq-train`, `fairseq-hydra-train`,
`fairseq-sffn cost` and `fairseq-sffn plan`. The architectures `*_gpt3_medium` set `--sffn-freq 6`.
"""

GATED = """\
For every architecture, dense ones included.
"""

CRITERIONS = """\
For `--criterion sffn_cross_entropy` and `--criterion sffn_label_smoothed_cross_entropy`, beside the
flags of fairseq's `cross_entropy` and `label_smoothed_cross_entropy`.
[What they log](criterions/README.md).
"""

TASK = """\
For `--task sffn_language_modeling`, beside the flags of fairseq's `language_modeling`. Sparse
models also train with `--task language_modeling`.
"""

OPTIMIZER = """\
`--optimizer sffn_adam` takes the flags of fairseq's `adam`. It computes the same update with
PyTorch's fused kernel and writes the same checkpoints: either optimizer resumes from the other.
With apex installed, fairseq's `adam` stores its step count elsewhere: `sffn_adam` then resumes from
`adam`, but `adam` does not resume from `sffn_adam`.
"""

LOADING = """\
For every command that loads a checkpoint, fairseq's and ours. The environment variables do the
same. [More about checkpoints](checkpoints/README.md).
"""

PROCESSES = """\
For fairseq's commands in several processes. The environment variable does the same.
[When a host fails](expert_parallel/README.md#when-a-host-fails).
"""

COMMANDS = """\
[What the commands do](tools/README.md).
"""

ENVIRONMENT = """\
| variable | |
| --- | --- |
| `FAIRSEQ_SFFN_KERNELS=off` | use neither the C++ kernels nor those in Triton |
| `XDG_CACHE_HOME` | compiled kernels are kept in its folder `fairseq_sffn` (default: `~/.cache`) |
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no flags."""


def run(args: argparse.Namespace) -> str:
    """Return the page."""
    return page()


def page() -> str:
    """Return FLAGS.md, without the last line break."""
    parts = [INTRODUCTION, "## Sparse layers\n", MODELS, options_table(fields(SparseOptions))]
    for name, selector in sorted(Selector.registry.items()):
        if own := selector_flags(selector):
            config = {option.name: option for option in fields(selector.Config)}
            parts += [
                f"### Selector `{name}`\n",
                f"{models_of(name)}\n",
                options_table({flag: config[field] for flag, field in own.items()}),
            ]
    parts += ["## Gated FFNs\n", GATED, options_table(fields(GatedOptions))]
    parts += ["## Criterions\n", CRITERIONS, options_table(fields(RoutingLossConfig))]
    own_fields = SFFNLanguageModelingConfig.__annotations__
    task = [option for option in fields(SFFNLanguageModelingConfig) if option.name in own_fields]
    parts += ["## Task\n", TASK, options_table(task), "## Optimizer\n", OPTIMIZER]
    parts += ["## Loading checkpoints\n", LOADING, loading_table()]
    parts += ["## Processes\n", PROCESSES, waiting_table()]
    parts += ["## Commands\n", COMMANDS, *command_tables()]
    parts += ["## Environment\n", ENVIRONMENT]
    return "\n".join(parts).rstrip("\n")


def models_of(selector: str) -> str:
    """Return the architectures that take a selector's flags."""
    names = [f"`transformer_lm_{m.name}`" for m in METHODS if m.selector == selector]
    return f"For {', '.join(names)}, and `--sffn-selector {selector}`."


def options_table(options: Iterable[Field[Any]] | Mapping[str, Field[Any]]) -> str:
    """Return a table of the dataclass fields that have a help text.

    Args:
        options: the fields, or a mapping from the name of an option to its field.
    """
    if not isinstance(options, Mapping):
        options = {option.name: option for option in options}
    rows = []
    for name, option in options.items():
        if "help" in option.metadata:
            value = None if option.default is MISSING else option.default
            rows.append((flag(name), value, option.metadata["help"], choices_of(option.type)))
    return table(rows)


def choices_of(kind: Any) -> list[str]:
    """Return the choices of an option; empty: the option takes any value of its type.

    Args:
        kind: the option's type; one of fairseq's ``ChoiceEnum`` types has choices.
    """
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, Enum):
            return [str(value) for value in one]
    return []


def loading_table() -> str:
    """Return the table of the flags of commands that load a checkpoint."""
    rows = [
        f"| `{name}` | `{variable}=1` | {escaped(text)} |"
        for name, (variable, text) in loading.FLAGS.items()
    ]
    return "\n".join(["| flag | variable | |", "| --- | --- | --- |", *rows, ""])


def waiting_table() -> str:
    """Return the table of the flag for the time that processes wait for each other."""
    row = f"| `{waiting.PEER_TIMEOUT}` | `{waiting.VARIABLE}` | {escaped(waiting.HELP)} |"
    return "\n".join(["| flag | variable | |", "| --- | --- | --- |", row, ""])


def command_tables() -> list[str]:
    """Return the heading and the table of each subcommand."""
    from .cli import COMMANDS as modules  # cli imports this module

    parts = []
    for name, module in modules.items():
        parser = argparse.ArgumentParser(add_help=False)
        module.add_arguments(parser)
        rows = []
        for action in parser._actions:
            shown = " ".join(action.option_strings) or (str(action.metavar or action.dest)).upper()
            if shown in loading.FLAGS:
                continue
            value = None if action.default in (argparse.SUPPRESS, False) else action.default
            rows.append((shown, value, action.help or "", list(action.choices or ())))
        if rows:
            parts += [f"### `fairseq-sffn {name}`\n", table(rows)]
    return parts


def table(rows: Iterable[tuple[str, Any, str, list[str]]]) -> str:
    """Return a Markdown table.

    Args:
        rows: (flag, default, help text, choices). If the default is ``None``, the table shows the
            default that the help text gives in parentheses.
    """
    lines = ["| flag | default | |", "| --- | --- | --- |"]
    for name, default, text, choices in rows:
        said = re.search(r"\s*\(default: ((?:[^()]|\([^()]*\))*)\)", text)
        if said:
            text = text.replace(said[0], "")
        shown = "" if default in (None, []) else f"`{default}`"
        if isinstance(default, bool):
            shown = "on" if default else "off"
        elif isinstance(default, float):
            shown = f"`{default:g}`"
        elif said and default is None:
            shown = said[1]
        if choices and not all(f"'{choice}'" in text for choice in choices):
            text += ": " + ", ".join(f"`{choice}`" for choice in choices)
        lines.append(f"| `{name}` | {escaped(shown)} | {escaped(text)} |")
    return "\n".join([*lines, ""])


def escaped(text: str) -> str:
    """Return text as a cell of a Markdown table: flags and quoted words become code."""
    text = re.sub(r"(?<![`\w])(--[a-z][\w-]*|</s>)", r"`\1`", text)
    text = re.sub(r"(?<!\w)'([\w./]+)'", r"`\1`", text)
    return text.replace("%(default)s", "").replace("|", r"\|")
