"""The blocks with the highest scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUMPY_DTYPES = (torch.float32, torch.float64)
PARTITIONED_BLOCKS, PARTITIONED_SCORES, PARTITIONED_ACTIVE = 128, 2**14, 8
"""Numbers of blocks, scores and active blocks from which on NumPy's partial sort is faster than
``topk`` on a CPU."""


def top_blocks(scores_NB: Tensor, active_blocks: int) -> Tensor:
    """Return the blocks with the highest scores, best first: (N, A) int64.

    The order of equal scores is undefined.
    """
    scores_NB = scores_NB.detach()
    if (
        scores_NB.device.type != "cpu"
        or scores_NB.dtype not in NUMPY_DTYPES
        or scores_NB.shape[1] < PARTITIONED_BLOCKS
        or scores_NB.numel() < PARTITIONED_SCORES
        or active_blocks < PARTITIONED_ACTIVE
    ):
        return scores_NB.topk(active_blocks, dim=-1).indices
    # NumPy's sorts use vector instructions and are several times faster than PyTorch's.
    if active_blocks == scores_NB.shape[1]:
        return torch.from_numpy(scores_NB.numpy().argsort(axis=1)).flip(1)
    parted = np.argpartition(scores_NB.numpy(), -active_blocks, axis=1)
    blocks_NA = torch.from_numpy(parted[:, -active_blocks:])
    order_NA = torch.from_numpy(scores_NB.gather(1, blocks_NA).numpy().argsort(axis=1))
    return blocks_NA.gather(1, order_NA.flip(1))
