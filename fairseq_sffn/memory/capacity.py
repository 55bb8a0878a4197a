"""Limits on how many tokens a block may take."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_within_capacity(
    blocks_NA: Tensor, num_blocks: int, factor: float, valid_N: Tensor | None
) -> Tensor:
    """Which assignments fit when a block takes ``factor`` times its fair share.

    The capacity is ``max(1, int(factor * ceil(assignments / B)))`` (Fedus et al. 2021, eq. 3).
    First choices go before second ones, and earlier tokens before later ones. With one block a
    token and tokens in order of time, a later token never displaces an earlier one; with more, the
    first choices of later tokens do displace second choices. Padding takes no room.

    Returns:
        (N, A) bool, ``False`` where the block was full.
    """
    num_tokens, active = blocks_NA.shape
    tokens = torch.tensor(num_tokens) if valid_N is None else valid_N.sum()
    capacity = factor * torch.ceil(tokens * active / num_blocks)
    capacity = capacity.clamp(max=blocks_NA.numel()).long().clamp(min=1)

    # Queue the pairs by choice, then by token; padding goes to a queue of its own.
    queue_P = blocks_NA.t().flatten()
    if valid_N is not None:
        queue_P = torch.where(valid_N.repeat(active), queue_P, num_blocks)
    sorted_P, order_P = queue_P.sort(stable=True)
    first_P = torch.searchsorted(sorted_P, sorted_P)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device) - first_P
    return (place_P < capacity.to(place_P.device)).view(active, num_tokens).t()
