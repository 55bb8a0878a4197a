"""Every change of fairseq's own code. See :mod:`.registry` for how one is declared.

``fairseq-sffn patches`` lists them.
"""

from . import (
    batches,
    checkpoints,
    collectives,
    commands,
    evaluation,
    launch,
    models,
    numpy_compat,
    options,
    trainer,
    training,
)
from .registry import Patch

MODULES = (
    *(batches, checkpoints, collectives, commands, evaluation, launch, models, numpy_compat),
    *(options, trainer, training),
)
PATCHES = tuple(
    value for module in MODULES for value in vars(module).values() if isinstance(value, Patch)
)


def apply() -> None:
    """Apply every patch. To apply them twice changes nothing."""
    for each in PATCHES:
        each.apply()
