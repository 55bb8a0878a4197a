"""Sparse feed-forward networks for language models."""
