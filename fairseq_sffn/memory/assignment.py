"""Balanced assignment of tokens to blocks, on the host.

Each of its hundreds of rounds depends on the numbers of the previous round. On an accelerator, the
host would wait in each round. One core of an AMD EPYC takes 20 to 34 ms for 8,192 tokens and 16
blocks, and 44 to 63 ms for 64 blocks. Skewed scores take longer
(``examples/benchmark/assignment.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

TOLERANCE = 0.01
"""Maximum loss of the mean score against the best assignment, in standard deviations of scores."""

SCALING = 8.0
"""Factor by which the bidding increment shrinks from one phase of the auction to the next."""

ROUNDS = 40
"""Maximum number of bidding rounds in a phase. Similar tokens outbid each other by one increment
per round; the tokens that remain are inserted one by one."""


@torch.no_grad()
def balanced_assignment(
    scores_NB: Tensor, tolerance: float = TOLERANCE, valid_N: Tensor | None = None
) -> Tensor:
    """Assign each token one block: the highest total score with loads that differ by at most one.

    The algorithm is an auction with epsilon scaling (Bertsekas and Castanon 1989, "The auction
    algorithm for the transportation problem"). In each round, all tokens without a block bid for
    the block with the highest score minus price. A token bids the price at which its second best
    block would be worth the same. A block keeps its highest bids; the lowest of them is its price.
    Of equal bids the oldest wins.

    With N = q * B + r, each block has q + 1 places, and B - r blocks leave one place free. Free
    places bid too, and a block takes at most one. Tokens and free places that still wait after
    some rounds are inserted by shortest augmenting paths.

    Args:
        scores_NB: score of each block for each token, on the CPU. Scores that are not finite count
            as 0.
        tolerance: the total score is at least the best assignment's, less N * tolerance * (standard
            deviation of the scores).
        valid_N: bool, ``False`` for tokens that are left out and get block 0; ``None``: none are.

    Returns:
        (N,) int64, the block of each token.
    """
    if valid_N is not None:
        blocks_of_all_N = torch.zeros(len(valid_N), dtype=torch.int64)
        blocks_of_all_N[valid_N] = balanced_assignment(scores_NB[valid_N], tolerance)
        return blocks_of_all_N
    num_tokens, num_blocks = scores_NB.shape
    scores_NB = scores_NB.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if scores_NB.numel():
        # Scaled to 1, so that squares of scores neither overflow nor vanish.
        scores_NB = scores_NB / scores_NB.abs().max().clamp(min=torch.finfo(torch.double).tiny)
    spread = scores_NB.std(correction=0) if scores_NB.numel() else scores_NB.new_zeros(())
    if num_blocks < 2 or spread == 0:  # nothing to choose
        return torch.arange(num_tokens) % num_blocks
    scores_NB = scores_NB / spread
    free = -num_tokens % num_blocks
    last_increment = tolerance * num_tokens / (num_tokens + free)
    increment = max(last_increment, float(scores_NB.max() - scores_NB.min()) / SCALING)
    prices_B: Array = np.zeros(num_blocks)
    while True:
        blocks_N, takes_free_B, prices_B = _auction(scores_NB.numpy(), prices_B, free, increment)
        if increment == last_increment:
            found = map(torch.from_numpy, (prices_B, blocks_N, takes_free_B))
            return _insert_waiting(scores_NB, free, *found)
        increment = max(last_increment, increment / SCALING)


def _auction(
    scores_NB: Array, prices_B: Array, free: int, increment: float
) -> tuple[Array, Array, Array]:
    """Run one phase of the auction.

    Returns:
        (N,) the block of each token, B for tokens that wait; (B,) whether each block takes a free
        place; and (B,) the prices, at which no token gains more than ``increment`` by moving.
    """
    num_tokens, num_blocks = scores_NB.shape
    places = (num_tokens + free) // num_blocks
    waiting_n = np.arange(num_tokens)
    # The H tokens with a place, and their bids, sorted by block, best bids first. NumPy compares
    # complex numbers by real part, here the block, then by imaginary part, here minus the bid.
    tokens_H, bids_H = np.empty(0, np.int64), np.empty(0, np.complex128)
    loads_B = np.zeros(num_blocks, np.int64)
    free_bids_B = np.full(num_blocks, -np.inf)  # bid of a free place in each block
    for _ in range(ROUNDS):
        waiting_free = free - np.isfinite(free_bids_B).sum()
        if not len(waiting_n) and not waiting_free:
            break
        if len(waiting_n):
            bids_n = _bids(scores_NB[waiting_n], prices_B, increment)
            order_n = bids_n.argsort(kind="stable")
            bids_n = bids_n[order_n]
            # Inserted, not sorted with all others: after the first rounds few tokens bid.
            places_n = bids_H.searchsorted(bids_n, side="right") + np.arange(len(bids_n))
            bids_H = _inserted(bids_H, bids_n, places_n)
            tokens_H = _inserted(tokens_H, waiting_n[order_n], places_n)
            loads_B += np.bincount(bids_n.real.astype(np.int64), minlength=num_blocks)
        if waiting_free:
            # Free places are all alike: together they bid for the cheapest blocks, up to the price
            # of the next one.
            costs_B = torch.from_numpy(np.maximum(prices_B, free_bids_B))
            cheapest = costs_B.topk(int(waiting_free) + 1, largest=False)
            free_bids_B[cheapest.indices[:-1].numpy()] = cheapest.values[-1] + increment

        ends_B = loads_B.cumsum()
        starts_B = ends_B - loads_B
        # A free place must beat the bid on the last place.
        last_B = np.minimum(starts_B + places - 1, len(bids_H) - 1)
        last_bids_B = np.where(loads_B >= places, -bids_H.imag[last_B], -np.inf)
        free_bids_B[free_bids_B <= last_bids_B] = -np.inf
        taken_B = np.isfinite(free_bids_B)
        room_B = places - taken_B
        # A full block's price is its lowest bid.
        lowest_B = np.clip(starts_B + room_B - 1, 0, len(bids_H) - 1)
        lowest_bids_B = np.where(room_B > 0, -bids_H.imag[lowest_B], np.inf)
        lowest_bids_B = np.minimum(lowest_bids_B, np.where(taken_B, free_bids_B, np.inf))
        prices_B = np.where(loads_B >= room_B, lowest_bids_B, prices_B)
        # Tokens without a place wait.
        over_B = np.maximum(loads_B - room_B, 0)
        out_n = np.arange(over_B.sum()) + np.repeat(ends_B - over_B.cumsum(), over_B)
        waiting_n = np.sort(tokens_H[out_n])
        if len(out_n):
            stays_H = np.ones(len(tokens_H), bool)
            stays_H[out_n] = False
            tokens_H, bids_H = tokens_H[stays_H], bids_H[stays_H]
            loads_B -= over_B
    blocks_N = np.full(num_tokens, num_blocks)
    blocks_N[tokens_H] = bids_H.real.astype(np.int64)
    return blocks_N, np.isfinite(free_bids_B), prices_B


def _bids(scores_nB: Array, prices_B: Array, increment: float) -> Array:
    """Compute each token's bid for its best block: (n,), the complex number block - bid * i."""
    worth_nB = scores_nB - prices_B
    tokens_n, block_n = np.arange(len(worth_nB)), worth_nB.argmax(axis=1)
    best_n = worth_nB[tokens_n, block_n]
    worth_nB[tokens_n, block_n] = -np.inf
    bids_n = block_n.astype(np.complex128)
    bids_n.imag = -(prices_B[block_n] + (best_n - worth_nB.max(axis=1)) + increment)
    return bids_n


def _inserted(values_H: Array, new_n: Array, places_n: Array) -> Array:
    """Insert new values, which get the given places in the result."""
    result = np.empty(len(values_H) + len(new_n), values_H.dtype)
    is_old = np.ones(len(result), bool)
    is_old[places_n] = False
    result[places_n], result[is_old] = new_n, values_H
    return result


def _insert_waiting(
    scores_NB: Tensor, free: int, prices_B: Tensor, blocks_N: Tensor, takes_free_B: Tensor
) -> Tensor:
    """Insert the tokens and free places that wait after :func:`_auction`.

    Each enters a block. If the block is full, a token leaves it for another block, and so on up to
    a block with room. The chosen path loses the least score: the successive shortest path
    algorithm, where a move costs its loss at the current prices. No move gains more than the
    auction's increment afterwards either, so that the bound of the tolerance holds.
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
        before_B = torch.full(
            (num_blocks,), -1, device=blocks_N.device
        )  # previous block on the path
        while True:  # Bellman-Ford
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
