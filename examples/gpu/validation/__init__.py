"""The points that validate.py checks on a GPU, with a file for each group of points."""
