"""Sparse feed-forward networks.

``fairseq_sffn.memory`` is plain PyTorch and needs no fairseq: importing it neither imports nor
changes fairseq. ``--user-dir fairseq_sffn`` loads :mod:`.plugin`. So does importing this package
after fairseq. A program that imports this package first imports :mod:`.plugin` itself.
"""

import sys

from . import versions

versions.check()

if "fairseq" in sys.modules:
    from . import plugin  # noqa: F401
