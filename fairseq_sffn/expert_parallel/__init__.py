"""Training in several processes: data parallel, and with the blocks of sparse layers shared out
(expert parallel).

The processes are fairseq's; :mod:`.launch` lets them run on CPUs too. How tokens travel is the
memory's own matter (:mod:`..memory.dispatch`); here is what the rest of training must know of it:
gradients and their norm (:mod:`.gradients`), and checkpoints in parts (:mod:`.checkpoints`).
"""
