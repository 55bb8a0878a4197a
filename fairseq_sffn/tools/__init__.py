"""Command-line tools and what they compute. They use fairseq with the plugin."""

from .. import plugin  # noqa: F401
