"""Reading and writing checkpoint files. Nothing here changes fairseq; :mod:`..patches` does.

- :mod:`.reading`: the one function that reads a file: nothing in it runs, damage is noticed.
- :mod:`.integrity`: checksums of files, fingerprints of tensors.
- :mod:`.structure`: what a checkpoint holds.
- :mod:`.loading`: a checkpoint of any version of fairseq, read by these rules.
- :mod:`.part_files`: the files of a checkpoint in parts.
- :mod:`.writing`: whole files or none, in the background too.
- :mod:`.resuming`: the checkpoint that a training goes on from.

Which part a process holds is a matter of :mod:`..expert_parallel.parts`.
"""
