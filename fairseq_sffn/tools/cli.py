"""The command ``fairseq-sffn``.

A subcommand is a module and a row in ``COMMANDS``. The module has ``add_arguments(parser)`` and
``run(args)``, which returns the text to print. The first line of its docstring is its help text. If
its parser sets a default for ``other_flags``, ``args.other_flags`` holds the flags that the parser
does not know. Otherwise, unknown flags are errors.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence

from . import (
    average,
    cost,
    evaluate,
    export,
    flags,
    import_folder,
    patches,
    plan,
    reshard,
    zero_shot,
)

COMMANDS = {
    "average": average,
    "cost": cost,
    "evaluate": evaluate,
    "export": export,
    "flags": flags,
    "import": import_folder,
    "patches": patches,
    "plan": plan,
    "reshard": reshard,
    "zero-shot": zero_shot,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand, and print what it returns.

    Args:
        argv: the command line without the program; ``None``: that of this process.

    Raises:
        UsageError: the subcommand cannot do what was asked.
    """
    warnings.simplefilter("ignore")  # libraries warn about each other
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    parser = argparse.ArgumentParser(
        prog="fairseq-sffn", description="Tools around sparse feed-forward networks for fairseq."
    )
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for name, module in COMMANDS.items():
        description = (module.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(
            name, help=description, description=description, allow_abbrev=False
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    args, others = parser.parse_known_args(argv)
    if others and "other_flags" not in args:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.other_flags = others
    print(args.run(args))
