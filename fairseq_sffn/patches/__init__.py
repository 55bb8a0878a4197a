"""Every change of fairseq's own code. See :mod:`.registry` for how one is declared.

``fairseq-sffn patches`` lists them.
"""

from . import batches, commands, evaluation, launch, models, numpy_compat, options
from .registry import Patch

MODULES = (batches, commands, evaluation, launch, models, numpy_compat, options)
PATCHES = tuple(
    value for module in MODULES for value in vars(module).values() if isinstance(value, Patch)
)


def apply() -> None:
    """Apply every patch. To apply them twice changes nothing."""
    for each in PATCHES:
        each.apply()
