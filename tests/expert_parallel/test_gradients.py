"""The gradients of sharded blocks, in one process."""

import pytest
import torch

from fairseq_sffn.expert_parallel.gradients import square_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_norm_is_in_single_precision(dtype: torch.dtype) -> None:
    """The squares of loss-scaled gradients overflow in half precision."""
    gradients = [torch.full((1000, 100), 100.0, dtype=dtype), torch.full((7,), 3.0, dtype=dtype)]
    found = square_norm(gradients)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1e9 + 63, rel=1e-5)


def test_the_norm_of_nothing() -> None:
    assert float(square_norm([])) == 0
