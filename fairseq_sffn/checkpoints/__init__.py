"""Reading and writing checkpoint files.

This package does not change fairseq; :mod:`..patches` does.

- :mod:`.reading`: reads a file without running its content, and detects damage.
- :mod:`.integrity`: checksums of files, fingerprints of tensors.
- :mod:`.structure`: the content of a checkpoint, and the check of it.
- :mod:`.stored_strings`: rules for the strings in a stored configuration.
- :mod:`.loading`: reads a checkpoint of any version of fairseq.
- :mod:`.part_files`: the files of a sharded checkpoint.
- :mod:`.writing`: writes whole files or none, also in the background.
- :mod:`.shared_folder`: waits for files that other hosts have written.
- :mod:`.resuming`: chooses the checkpoint from which training resumes.

:mod:`..expert_parallel.parts` decides which part a process holds.
"""
