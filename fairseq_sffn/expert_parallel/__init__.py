"""Training in several processes, also with expert parallelism: ranks then hold different blocks.

- :mod:`.launch`: devices, and the settings of launchers such as torchrun.
- :mod:`.settings`: checks the options for several processes, and compares them between ranks.
- :mod:`.peers`: watches the other processes, and names a lost one.
- :mod:`.gradients`: gradient synchronisation, and the norm of all gradients.
- :mod:`.parts`: the part of a checkpoint that a process holds.
- :mod:`.saving`: saves a checkpoint from all processes that hold a part.

:mod:`..memory.dispatch` sends tokens between ranks.
"""
