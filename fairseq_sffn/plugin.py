"""The fairseq plugin: registers models, criterions, tasks and optimizers, and patches fairseq.

fairseq imports the folders ``models`` and ``tasks`` of a plugin only if the plugin was not imported
before, so everything that registers itself is imported here by name.
"""

import warnings

with warnings.catch_warnings():
    # fairscale (imported by fairseq) warns about its own deprecated torch calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="fairscale")
    from . import criterions, models, optim, patches, tasks

patches.apply()

__all__ = ["criterions", "models", "optim", "patches", "tasks"]
