"""Training in several processes whose ranks hold different blocks (expert parallel).

- :mod:`.launch`: starts fairseq's processes on CPUs too, and compares their settings.
- :mod:`.gradients`: gradient synchronisation, and the norm of all gradients.
- :mod:`.parts`: the part of a checkpoint that a process holds.
- :mod:`.saving`: saving a checkpoint from all processes that hold a part.

Tokens travel inside the memory (:mod:`..memory.exchange`).
"""
