"""Limits on the number of tokens that a block takes."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import Selection


def drop_over_capacity(
    selection: Selection, num_blocks: int, factor: float, counted: Tensor | None
) -> tuple[Selection, Tensor]:
    """Drop the assignments that do not fit their block.

    Args:
        selection, counted: see :meth:`.selection.Selection.counted`.
        num_blocks: B.
        factor: see :func:`keep_within_capacity`.

    Returns:
        The selection with ``kept``, and () int64 the number of dropped assignments.
    """
    fits_NA = keep_within_capacity(selection.blocks, num_blocks, factor, counted)
    dropped = (~fits_NA).sum()
    if selection.kept is not None:
        fits_NA = fits_NA & selection.kept
    return selection._replace(kept=fits_NA), dropped


def keep_within_capacity(
    blocks_NA: Tensor, num_blocks: int, factor: float, counted: Tensor | None
) -> Tensor:
    """Find the assignments that fit when a block takes ``factor`` times its fair share.

    The capacity of a block is ``max(1, int(factor * ceil(assignments / B)))`` (Fedus et al. 2021,
    eq. 3). First choices go before second choices, and earlier tokens before later ones. With one
    block per token, and tokens in the order of time, a later token never displaces an earlier one.
    With more, the first choices of later tokens displace second choices of earlier tokens.

    Args:
        blocks_NA: selected blocks, best first.
        num_blocks: B.
        factor: capacity factor.
        counted: bool, broadcasts to (N, A). The others, such as padding, take no capacity. ``None``
            counts all.

    Returns:
        (N, A) bool, ``False`` for counted assignments beyond the capacity of their block.
    """
    num_tokens, active = blocks_NA.shape
    if counted is None:
        # Not `torch.tensor`, whose copy from the host waits for the device.
        assignments = blocks_NA.new_full((), blocks_NA.numel())
    else:
        counted = counted.expand_as(blocks_NA)
        assignments = counted.sum()
    capacity = factor * torch.ceil(assignments / num_blocks)
    capacity = capacity.clamp(max=blocks_NA.numel()).long().clamp(min=1)

    # One queue per block, ordered by choice, then by token; uncounted assignments have their own.
    queue_P = blocks_NA.t().flatten()
    if counted is not None:
        queue_P = torch.where(counted.t().flatten(), queue_P, num_blocks)
    sorted_P, order_P = queue_P.sort(stable=True)
    first_P = torch.searchsorted(sorted_P, sorted_P)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device) - first_P
    fits_NA = (place_P < capacity).view(active, num_tokens).t()
    return fits_NA if counted is None else fits_NA | ~counted
