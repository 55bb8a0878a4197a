"""Sparse feed-forward networks for fairseq: what ``--user-dir fairseq_sffn`` loads.

fairseq imports ``models`` and ``tasks`` of a plugin only if the plugin was not imported before, so
everything that registers itself is imported here by name.
"""

import warnings

with warnings.catch_warnings():
    # Of its own use of PyTorch; fairseq imports it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="fairscale")
    from . import compat

compat.apply()

from . import checks, configuration, criterions, models, optim, tasks  # noqa: E402
from .parallel import checkpoints, gradients, launch  # noqa: E402

# The configuration last, so that its wrappers go around all others.
for repairs in (checks, launch, gradients, checkpoints, configuration):
    repairs.apply()

__all__ = ["checks", "compat", "criterions", "models", "optim", "tasks"]
