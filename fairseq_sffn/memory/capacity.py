"""Limits on how many tokens a block may take."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_within_capacity(
    blocks_NA: Tensor, num_blocks: int, factor: float, counted: Tensor | None
) -> Tensor:
    """Which assignments fit when a block takes ``factor`` times its fair share.

    The capacity is ``max(1, int(factor * ceil(assignments / B)))`` (Fedus et al. 2021, eq. 3).
    First choices go before second ones, and earlier tokens before later ones. With one block a
    token and tokens in order of time, a later token never displaces an earlier one; with more, the
    first choices of later tokens do displace second choices.

    Args:
        blocks_NA: selected blocks, best first.
        num_blocks: B.
        factor: see above.
        counted: bool, broadcasts to (N, A): the others are no assignments (padding, say) and take
            no room; ``None``: all are.

    Returns:
        (N, A) bool, ``False`` where the block was full for an assignment.
    """
    num_tokens, active = blocks_NA.shape
    if counted is None:
        # No `torch.tensor`, whose copy from the host waits for the device.
        assignments = blocks_NA.new_full((), blocks_NA.numel())
    else:
        counted = counted.expand_as(blocks_NA)
        assignments = counted.sum()
    capacity = factor * torch.ceil(assignments / num_blocks)
    capacity = capacity.clamp(max=blocks_NA.numel()).long().clamp(min=1)

    # Queue the pairs by choice, then by token; what does not count goes to a queue of its own.
    queue_P = blocks_NA.t().flatten()
    if counted is not None:
        queue_P = torch.where(counted.t().flatten(), queue_P, num_blocks)
    sorted_P, order_P = queue_P.sort(stable=True)
    first_P = torch.searchsorted(sorted_P, sorted_P)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device) - first_P
    fits_NA = (place_P < capacity).view(active, num_tokens).t()
    return fits_NA if counted is None else fits_NA | ~counted
