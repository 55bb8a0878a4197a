"""The oldest PyTorch that the plugin runs on. pip is not asked for it, and replaces nobody's."""

import torch

OLDEST_PYTORCH = "2.9"


def check() -> None:
    """Raises ImportError where PyTorch is older."""
    # Compared as versions, not as strings: torch.__version__ sees to that.
    if torch.__version__ < OLDEST_PYTORCH:
        needed = f"PyTorch {OLDEST_PYTORCH} or newer"
        raise ImportError(f"fairseq_sffn needs {needed}: this is {torch.__version__}")
