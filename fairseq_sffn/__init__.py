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
    checks,
    configuration,
    criterions,
    interruptions,
    mixed_precision,
    models,
    optim,
    options,
    splits,
    tasks,
)
from .checkpoints import loading, resuming, training_state, writing  # noqa: E402
from .expert_parallel import checkpoints as sharded_checkpoints  # noqa: E402
from .expert_parallel import gradients, launch  # noqa: E402

# The configuration last, so that its wrappers go around all others.
for repairs in (
    *(loading, writing, checks, launch, gradients, sharded_checkpoints, resuming),
    *(training_state, interruptions, mixed_precision, options, splits, configuration),
):
    repairs.apply()

__all__ = ["checks", "compat", "criterions", "models", "optim", "tasks"]
