"""The computation of the selected blocks: exact, without dropping or padding.

An *engine* (:mod:`.engines`) computes the output from a selection and the tables. All engines give
the same numbers up to rounding, at different cost; :func:`choose_engine` picks one by size.

- Sorted assignments: each half of the memory, x . keys and h . values, is an autograd function
  (:mod:`.sorted_assignments`) over chunks of assignments sorted by block (:mod:`.chunks`), and
  multiplies block by block (:mod:`.grouped_mm`).
- Tiles: assignments sorted by block and cut into tiles (:mod:`.tiles`) without a read from the
  device; PyTorch operators multiply the tiles (:mod:`.tiled_products`), in Triton or in PyTorch.
- Embedding bags: each token sums table rows (:mod:`.embedding_bag`), for blocks of one cell and
  for few tokens.

On a CPU the first and the last use C++ kernels (:mod:`.kernels`) if a compiler is installed.
"""

from .choice import choose_engine
from .engines import ENGINES, NATIVE, Engine, Tables

__all__ = ["ENGINES", "NATIVE", "Engine", "Tables", "choose_engine"]
