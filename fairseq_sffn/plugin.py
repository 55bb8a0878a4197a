"""The fairseq plugin: registers models, criterions, tasks and optimizers, and patches fairseq.

fairseq imports the folders ``models`` and ``tasks`` of a plugin only if the plugin was not imported
before, so everything that registers itself is imported here by name.
"""

import warnings

with warnings.catch_warnings():
    # fairscale (imported by fairseq) warns about its own deprecated torch calls.
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
    patches,
    splits,
    tasks,
)
from .checkpoints import loading, resuming, training_state, writing  # noqa: E402
from .expert_parallel import checkpoints as sharded_checkpoints  # noqa: E402
from .expert_parallel import gradients, launch  # noqa: E402

# The configuration last, so that its wrapper goes around all others.
for repairs in (
    *(loading, writing, checks, launch, gradients, sharded_checkpoints, resuming),
    *(training_state, interruptions, mixed_precision, splits, configuration),
):
    repairs.apply()
patches.apply()

__all__ = ["criterions", "models", "optim", "patches", "tasks"]
