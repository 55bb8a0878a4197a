"""Command-line tools and what they compute."""
