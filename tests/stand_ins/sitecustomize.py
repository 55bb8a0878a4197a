"""Runs first in each process that a test starts. It hides scikit-learn and SciPy, so that fairseq
is imported in three seconds instead of four. Only a criterion that no test uses needs them."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

NAMES = {
    "sklearn": (),
    "sklearn.metrics": ("f1_score", "matthews_corrcoef"),
    "scipy.stats": ("pearsonr", "spearmanr"),
}

for name, members in NAMES.items():
    sys.modules[name] = module = module_from_spec(ModuleSpec(name, None))
    for member in members:
        setattr(module, member, None)
