"""Checks of a command's options before the first update. This package does not change fairseq.

- :mod:`.ranges`: the range of each number.
- :mod:`.relations`: conditions on an option that depend on other options.
- :mod:`.checks`: compares a configuration with both.
- :mod:`.commands`: further checks for each of fairseq's commands.
- :mod:`.model`: checks of a model's options, dictionaries and size.
- :mod:`.splits`: checks that the data of a command exists.
- :mod:`.configuration`: the types of configurations that fairseq's functions take.
"""
