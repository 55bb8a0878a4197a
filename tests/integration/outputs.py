"""Reads what fairseq's commands print and save."""

import re
from pathlib import Path
from typing import Any

import torch

from tests.commands import records


def logged(log: str, *names: str) -> list[tuple[str, ...]]:
    """Return the values that were logged under these names at each update."""
    return [tuple(record[name] for name in names) for record in records(log)]


def valid_ppl(log: str) -> float:
    return float(records(log, "valid")[-1]["valid_ppl"])


def last_checkpoint(save_dir: Path) -> dict[str, Any]:
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


def hypotheses(output: str) -> dict[str, tuple[str, list[float]]]:
    """Return sample -> text and scores (base 2) of its tokens, as generation printed them."""
    texts = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", output, re.M))
    scores = dict(re.findall(r"^P-(\d+)\t(.*)$", output, re.M))
    return {n: (texts[n], [float(score) for score in scores[n].split()]) for n in texts}
