"""The command ``fairseq-sffn``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args)``, which returns what to
print, and a row in ``COMMANDS``. It gets flags that its parser does not know in
``args.other_flags``, if it declares that as a default; otherwise they are errors.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence

from . import average, cost, evaluate, flags, patches, plan, reshard, zero_shot

COMMANDS = {
    "average": average,
    "cost": cost,
    "evaluate": evaluate,
    "flags": flags,
    "patches": patches,
    "plan": plan,
    "reshard": reshard,
    "zero-shot": zero_shot,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Raises:
        UsageError: it cannot do what was asked.
    """
    warnings.simplefilter("ignore")  # of libraries, about each other
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
