"""The command ``python PATH/examples/experiments``, with the subcommands ``run`` and ``report``."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand."""
    # Importing fairseq lets all loggers print debugging messages.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        from experiments import report, run
    except ModuleNotFoundError as error:
        fix = "pip install -e '.[experiments]' in the project's root"
        raise SystemExit(f"{error.name} is not installed: {fix}") from error

    warnings.simplefilter("ignore")  # libraries warn about each other
    logging.getLogger().setLevel(logging.WARNING)

    about = "Trains the models of tables and reports the results."
    parser = argparse.ArgumentParser("experiments", description=about)
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for name, module in (("run", run), ("report", report)):
        about = (module.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=about, description=about, allow_abbrev=False)
        module.add_arguments(subparser)
        subparser.set_defaults(command=module.run)
    args = parser.parse_args(argv)
    print(args.command(args))


if __name__ == "__main__":
    # Started as a folder, the command would find the package's modules, but not the package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
