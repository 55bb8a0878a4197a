"""How the selected blocks are computed: exactly, without dropping or padding.

(token, block) pairs are sorted by block, and each half of the memory, x . keys and h . values, is
one autograd function over grouped matrix products (:mod:`.functions`). An *engine* is a way to
multiply rows with the matrices of their groups (:mod:`.engines`): all give the same numbers at
different cost. :func:`choose_engine` is the one place that picks.
"""

from .engines import ENGINES, Engine, choose_engine
from .functions import combine, score
from .plan import Plan, make_plan

__all__ = ["ENGINES", "Engine", "Plan", "choose_engine", "combine", "make_plan", "score"]
