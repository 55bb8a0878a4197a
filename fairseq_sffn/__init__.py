"""Sparse feed-forward networks for fairseq: what ``--user-dir fairseq_sffn`` loads.

fairseq imports ``models`` and ``tasks`` of a plugin only if the plugin was not imported before, so
everything that registers itself is imported here by name.
"""

import warnings

from . import versions

versions.check()

with warnings.catch_warnings():
    # Of its own use of PyTorch; fairseq imports it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="fairscale")
    from . import compat, evaluation

evaluation.apply()
compat.apply()

from . import (  # noqa: E402
    configuration,
    criterions,
    mixed_precision,
    models,
    optim,
    options,
    splits,
    tasks,
)
from .checkpoints import loading  # noqa: E402
from .expert_parallel import launch  # noqa: E402
from .patches import checkpoints, collectives, trainer, training  # noqa: E402
from .patches.registry import Patch  # noqa: E402

# The configuration last, so that its wrappers go around all others.
for repairs in (loading, launch, mixed_precision, options, splits, configuration):
    repairs.apply()
for patches in (trainer, training, checkpoints, collectives):
    for declared in vars(patches).values():
        if isinstance(declared, Patch):
            declared.apply()

__all__ = ["compat", "criterions", "models", "optim", "tasks"]
