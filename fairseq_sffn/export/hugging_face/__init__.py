"""The classes that transformers loads from an exported folder.

The modules are copied into the folder (:mod:`..vendoring`). Only these modules import transformers.
"""
