"""Training in several processes whose ranks hold different blocks (expert parallel).

- :mod:`.launch`: where processes run, and what a launcher tells them.
- :mod:`.settings`: checks the options for several processes, and compares them between ranks.
- :mod:`.gradients`: gradient synchronisation, and the norm of all gradients.
- :mod:`.parts`: the part of a checkpoint that a process holds.
- :mod:`.saving`: saving a checkpoint from all processes that hold a part.

Tokens travel inside the memory (:mod:`..memory.dispatch`).
"""
