"""The points that validate.py checks on a GPU, a file for each group of them."""
