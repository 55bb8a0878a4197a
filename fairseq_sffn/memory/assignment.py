"""Balanced assignment of tokens to blocks."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 0.01
"""How far the mean score of an assignment may be below the best, in standard deviations."""

SCALING = 8.0
"""By how much the bidding increment shrinks from one phase of the auction to the next."""

ROUNDS = 40
"""Rounds of bidding in a phase. Tokens that are alike outbid each other by an increment at a time,
for long; those left over are inserted one by one."""


@torch.no_grad()
def balanced_assignment(
    scores_NB: Tensor, tolerance: float = TOLERANCE, valid_N: Tensor | None = None
) -> Tensor:
    """Give each token one block, such that loads differ by at most one and scores sum to the most.

    An auction with epsilon scaling (Bertsekas and Castanon 1989, "The auction algorithm for the
    transportation problem"): tokens without a block bid, all at once, for the block that is worth
    most to them at today's prices, up to where the next best would be worth as much; a block keeps
    its highest bids, and its lowest one is its price. With N = q * B + r, blocks have q + 1 places,
    of which B - r blocks leave one free: free places bid too, and a block takes one at most. What
    still waits after some rounds is inserted by shortest augmenting paths, block by block.

    Args:
        scores_NB: how well each block fits each token. What is not finite counts as 0.
        tolerance: the scores of the result sum to at least the best assignment's, less
            N * tolerance * (standard deviation of the scores).
        valid_N: bool, ``False`` at tokens that are left out and get block 0; ``None``: all take
            part.

    Returns:
        (N,) int64 block of each token.
    """
    if valid_N is not None:
        blocks_N = valid_N.long() * 0
        blocks_N[valid_N] = balanced_assignment(scores_NB[valid_N], tolerance)
        return blocks_N
    num_tokens, num_blocks = scores_NB.shape
    scores_NB = scores_NB.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if scores_NB.numel():
        # Squares of scores of any scale then neither overflow nor vanish.
        scores_NB = scores_NB / scores_NB.abs().max().clamp(min=torch.finfo(torch.double).tiny)
    spread = scores_NB.std(correction=0) if scores_NB.numel() else scores_NB.new_zeros(())
    if num_blocks < 2 or spread == 0:  # nothing to choose
        return torch.arange(num_tokens, device=scores_NB.device) % num_blocks
    scores_NB = scores_NB / spread
    free = -num_tokens % num_blocks
    last_increment = tolerance * num_tokens / (num_tokens + free)
    increment = max(last_increment, float(scores_NB.max() - scores_NB.min()) / SCALING)
    prices_B = scores_NB.new_zeros(num_blocks)
    while True:
        blocks_N, takes_free_B, prices_B = _auction(scores_NB, prices_B, free, increment)
        if increment == last_increment:
            return _insert_waiting(scores_NB, prices_B, free, blocks_N, takes_free_B)
        increment = max(last_increment, increment / SCALING)


def _auction(
    scores_NB: Tensor, prices_B: Tensor, free: int, increment: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One phase: the block of each token, B for those that wait; whether each block takes a free
    place; and the prices at which none of them gains more than ``increment`` by moving."""
    num_tokens, num_blocks = scores_NB.shape
    places = (num_tokens + free) // num_blocks
    blocks_N = torch.full((num_tokens,), num_blocks, device=scores_NB.device)  # none yet
    bids_N = scores_NB.new_zeros(num_tokens)
    free_bids_B = torch.full_like(prices_B, -torch.inf)  # what a free place bids in each block
    for _ in range(ROUNDS):
        waiting = (blocks_N == num_blocks).nonzero().squeeze(1)
        waiting_free = free - int(free_bids_B.isfinite().sum())
        if not len(waiting) and not waiting_free:
            break
        if len(waiting):
            scores_nB = scores_NB[waiting]
            best = (scores_nB - prices_B).topk(2, dim=1)
            block_n = best.indices[:, 0]
            surplus_n = best.values[:, 0] - best.values[:, 1]
            blocks_N[waiting] = block_n
            bids_N[waiting] = prices_B[block_n] + surplus_n + increment
        if waiting_free:
            # They are alike: together they bid for the cheapest places, up to the next one's price.
            cheapest = torch.maximum(prices_B, free_bids_B).topk(waiting_free + 1, largest=False)
            free_bids_B[cheapest.indices[:-1]] = cheapest.values[-1] + increment

        # Best bids first, block by block; those without a block come last.
        order_N = bids_N.argsort(descending=True)
        order_N = order_N[blocks_N[order_N].argsort(stable=True)]
        sorted_N = blocks_N[order_N]
        edges = torch.searchsorted(sorted_N, torch.arange(num_blocks + 1, device=sorted_N.device))
        starts_B, loads_B = edges[:-1], edges.diff()
        # The bid that a free place must beat is the one on the last place.
        last_B = (starts_B + places - 1).clamp(max=num_tokens - 1)
        last_bids_B = bids_N[order_N[last_B]].where(loads_B >= places, -torch.inf)
        free_bids_B = free_bids_B.where(free_bids_B > last_bids_B, -torch.inf)
        taken_B = free_bids_B.isfinite()
        room_B = places - taken_B.long()
        rank_N = torch.arange(num_tokens, device=sorted_N.device) - edges[sorted_N]
        room_N = torch.cat([room_B, room_B.new_zeros(1)])[sorted_N]
        blocks_N[order_N[rank_N >= room_N]] = num_blocks
        # A full block's price is its lowest bid.
        lowest_B = (starts_B + room_B - 1).clamp(0, num_tokens - 1)
        lowest_bids_B = bids_N[order_N[lowest_B]].where(room_B > 0, torch.inf)
        lowest_bids_B = lowest_bids_B.minimum(free_bids_B.where(taken_B, torch.inf))
        prices_B = torch.where(loads_B >= room_B, lowest_bids_B, prices_B)
    return blocks_N, free_bids_B.isfinite(), prices_B


def _insert_waiting(
    scores_NB: Tensor, prices_B: Tensor, free: int, blocks_N: Tensor, takes_free_B: Tensor
) -> Tensor:
    """Complete what :func:`_auction` returned.

    Each token or free place that waits enters a block; if that is full, one leaves it for another
    block, and so on to a block with room, such that the scores lose the least: the successive
    shortest path algorithm, in which moves cost what they lose at the prices. That no move gains
    more than the auction's increment stays true, and with it the bound.
    """
    num_tokens, num_blocks = scores_NB.shape
    places = (num_tokens + free) // num_blocks
    while True:
        waiting = (blocks_N == num_blocks).nonzero().squeeze(1).tolist()
        if not waiting and int(takes_free_B.sum()) == free:
            return blocks_N
        gains_NB = scores_NB - prices_B
        held_n = (blocks_N < num_blocks).nonzero().squeeze(1)
        from_n1 = blocks_N[held_n].unsqueeze(1)
        losses_nB = gains_NB[held_n].gather(1, from_n1) - gains_NB[held_n]
        costs_BB = scores_NB.new_full((num_blocks, num_blocks), torch.inf)
        costs_BB.scatter_reduce_(0, from_n1.expand_as(losses_nB), losses_nB, "amin")
        free_costs_BB = (prices_B - prices_B.unsqueeze(1)).where(
            takes_free_B.unsqueeze(1) & ~takes_free_B, torch.inf
        )
        free_moves_BB = free_costs_BB < costs_BB
        costs_BB = costs_BB.minimum(free_costs_BB).clamp(min=0)

        if waiting:
            distances_B = gains_NB[waiting[0]].max() - gains_NB[waiting[0]]
        else:
            distances_B = prices_B.where(~takes_free_B, torch.inf)
            distances_B = distances_B - distances_B.min()
        before_B = torch.full((num_blocks,), -1, device=blocks_N.device)  # on the way
        while True:  # Bellman and Ford
            shortest = (distances_B.unsqueeze(1) + costs_BB).min(dim=0)
            shorter_B = shortest.values < distances_B
            if not shorter_B.any():
                break
            distances_B = shortest.values.where(shorter_B, distances_B)
            before_B = shortest.indices.where(shorter_B, before_B)

        loads_B = torch.bincount(blocks_N, minlength=num_blocks + 1)[:-1] + takes_free_B
        block = int(distances_B.where(loads_B < places, torch.inf).argmin())
        prices_B = prices_B + (distances_B[block] - distances_B).clamp(min=0)
        while (previous := int(before_B[block])) >= 0:
            if free_moves_BB[previous, block]:
                takes_free_B[previous], takes_free_B[block] = False, True
            else:
                losses_n = losses_nB[:, block].where(from_n1.squeeze(1) == previous, torch.inf)
                blocks_N[held_n[losses_n.argmin()]] = block
            block = previous
        if waiting:
            blocks_N[waiting[0]] = block
        else:
            takes_free_B[block] = True
