"""Comparisons of models, from declarative files: what is trained, how, and what came out.

A *table* (TOML) names rows, each a model with flags; a *scale* (TOML) says how large models are and
how they are trained. Together they give *cells*, a training each, whose results are a JSON file
each.
"""
