"""The command ``fairseq-sffn`` and its subcommands. Importing it loads the plugin."""

from .. import plugin  # noqa: F401
