"""All changes of fairseq's own code. :mod:`.registry` describes how to declare one.

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
    """Apply all patches. A second call changes nothing."""
    for each in PATCHES:
        each.apply()
