"""Checks of a command's options before any work. Nothing here changes fairseq.

- :mod:`.ranges`: the range of each number.
- :mod:`.relations`: what an option must be, given others.
- :mod:`.checks`: compares a configuration with both.
- :mod:`.commands`: what each of fairseq's commands checks besides.
- :mod:`.model`: the options of a model, with its dictionaries and its size.
- :mod:`.splits`: the data that a command names.
- :mod:`.configuration`: the types of configurations that fairseq's functions take.
"""
