"""Functions of PyTorch under their current names and older ones.
``tests/expert_parallel/test_collectives.py`` tests the collective operations."""

import pytest
import torch
import torch.nn.functional as F

from fairseq_sffn.memory.renamed import grouped_mm


def test_name_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "grouped_mm", lambda left, right, offs: "new", raising=False)
    monkeypatch.setattr(torch, "_grouped_mm", lambda left, right, offs: "old", raising=False)
    operands = torch.ones(2, 4), torch.ones(1, 4, 4), torch.tensor([2])
    assert grouped_mm(*operands) == "new"
    monkeypatch.delattr(F, "grouped_mm")
    assert grouped_mm(*operands) == "old"
