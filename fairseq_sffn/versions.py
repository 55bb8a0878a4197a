"""The oldest PyTorch that the package runs on.

setup.py does not require it, because pip would replace an installed PyTorch.
"""

import torch

OLDEST_PYTORCH = "2.9"


def check() -> None:
    """Compare the installed PyTorch with ``OLDEST_PYTORCH``.

    Raises:
        ImportError: PyTorch is older.
    """
    # torch.__version__ compares as a version, not as a string.
    if torch.__version__ < OLDEST_PYTORCH:
        needed = f"PyTorch {OLDEST_PYTORCH} or newer"
        raise ImportError(f"fairseq_sffn needs {needed}: this is {torch.__version__}")
