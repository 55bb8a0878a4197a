"""Reading and writing checkpoint files, for training and for every command that loads a model.

- :mod:`.reading`: the one function that reads a file: nothing in it runs, damage is noticed.
- :mod:`.integrity`: checksums of files, fingerprints of tensors.
- :mod:`.structure`: what a checkpoint holds.
- :mod:`.stored_configuration`: what a checkpoint's configuration may say.
- :mod:`.loading`: fairseq's loading functions, by these rules.
- :mod:`.writing`: fairseq's writing functions: whole files or none, in the background too.
- :mod:`.resuming`: the checkpoint that a training goes on from.

Checkpoints whose blocks lie in several files are in :mod:`..expert_parallel.checkpoints`.
"""
