"""How the selected blocks are computed: exactly, without dropping or padding.

An *engine* (:mod:`.engines`) takes a selection and the tables to the output: all give the same
numbers at different cost, and :func:`choose_engine` is the one place that picks. In general,
(token, block) pairs are sorted by block (:mod:`.plan`), and each half of the memory, x . keys and
h . values, is one autograd function (:mod:`.sorted_pairs`) over matrix products of each block
(:mod:`.products`). Blocks of one cell, and a few tokens, are bags of rows (:mod:`.bags`). On a CPU
both use kernels in C++ (:mod:`.kernels`) where these can be compiled.
"""

from .engines import ENGINES, NATIVE, Engine, Tables, choose_engine

__all__ = ["ENGINES", "NATIVE", "Engine", "Tables", "choose_engine"]
