"""Experiments: trains the models of declarative tables and reports their results.

A *table* (TOML) has rows, each a model with flags. A *scale* (TOML) says how large models are and
how they are trained. Together they give training *runs*; each run leaves its result in a JSON file.
Reports turn these files into tables, figures and verdicts on claims.

Where a file, flag or run is wrong, functions raise a :class:`UsageError` with one line about it.
"""
