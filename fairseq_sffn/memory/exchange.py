"""Several processes that share one memory: blocks on different ranks, tokens that travel to them.

Every rank routes its own tokens, sends each to the ranks that hold its blocks, once to a rank,
however many blocks it uses there, and adds up what comes back. Nothing is dropped or padded to a
capacity (as in Gale et al. 2022, arXiv 2211.15841; the exchange is that of Lepikhin et al. 2020,
arXiv 2006.16668, section 3.2, with uneven parts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .renamed import all_gather_single, reduce_scatter_single
from .selection import Selection

INDEX_BYTES = 4
"""Of each of the two numbers that tell a rank which row uses which of its blocks."""

SIZES_BYTES = 3 * torch.int64.itemsize
"""Sent to each rank ahead: the number of rows and of pairs, and the most pairs of a row."""


@dataclass(frozen=True)
class ProcessGroups:
    """With which other processes a memory shares its tokens and its blocks.

    Attributes:
        tokens: the group whose tokens are one micro-batch to the balance loss, or ``None``.
        blocks: the group over which the blocks are sharded, equally many consecutive ones to a
            rank, or ``None``. All its ranks must call the memory together.
    """

    tokens: dist.ProcessGroup | None = None
    blocks: dist.ProcessGroup | None = None

    # A copy in the same process shares as well; one that goes elsewhere does not.
    def __deepcopy__(self, memo: Any) -> ProcessGroups:
        return self

    def __reduce__(self) -> tuple[type[ProcessGroups], tuple[()]]:
        return ProcessGroups, ()

    @property
    def shards(self) -> int:
        """Ranks that hold a part of the blocks each."""
        return 1 if self.blocks is None else dist.get_world_size(self.blocks)

    @property
    def shard(self) -> int:
        """Which part this rank holds."""
        return 0 if self.blocks is None else dist.get_rank(self.blocks)

    def part_of(self, rows: int) -> slice:
        """The rows of a table that this rank holds, of so many in all."""
        each = rows // self.shards
        return slice(self.shard * each, (self.shard + 1) * each)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, one after the other: (R, ...) -> (shards * R, ...)."""
        if self.blocks is None:
            return part
        return _Gather.apply(part, self.blocks)

    def gather_tokens(self, rows: Tensor) -> tuple[Tensor, slice]:
        """The rows that the ranks that share tokens have, as many as each has: (n, ...) -> (sum of
        n, ...), and which of them are this rank's. No gradients. The host waits for the device
        once, to read how many rows each rank has."""
        if self.tokens is None:
            return rows, slice(0, len(rows))
        ranks, me = dist.get_world_size(self.tokens), dist.get_rank(self.tokens)
        counts_R = torch.zeros(ranks, dtype=torch.int64, device=rows.device)
        own = torch.full((1,), len(rows), device=rows.device)
        all_gather_single(counts_R, own, group=self.tokens)
        counts = counts_R.tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        all_padded = padded.new_empty(ranks * len(padded), *rows.shape[1:])
        all_gather_single(all_padded, padded, group=self.tokens)
        pieces = all_padded.unflatten(0, (ranks, max(counts))).unbind()
        start = sum(counts[:me])
        gathered = [piece[:count] for piece, count in zip(pieces, counts, strict=True)]
        return torch.cat(gathered), slice(start, start + len(rows))

    def stack_over_tokens(self, values: Tensor) -> Tensor:
        """Stack the values that the ranks that share tokens have, all of one shape: (...) ->
        (ranks, ...). No gradients."""
        if self.tokens is None:
            return values.unsqueeze(0)
        stacked = values.new_empty(dist.get_world_size(self.tokens), *values.shape)
        all_gather_single(stacked, values.detach().unsqueeze(0).contiguous(), group=self.tokens)
        return stacked

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """What the ranks that share tokens have, added up; gradients reach all of them."""
        if self.tokens is None:
            return values
        return _Sum.apply(values, self.tokens)


# torch.distributed.nn had these, but is deprecated, and failed in a group without rank 0 (gloo).


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty(dist.get_world_size(group) * len(part), *part.shape[1:])
        all_gather_single(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        reduce_scatter_single(part, grad.contiguous(), group=ctx.group)
        return part, None


class _Exchange(torch.autograd.Function):
    """Rows to and from each rank; gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sent, received = ctx.sizes
        return _all_to_all(grad, received, sent, ctx.group), None, None, None


class _SumByToken(torch.autograd.Function):
    # As index_add, which would keep the rows for backward.
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, tokens_R: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(tokens_R)
        wide = torch.promote_types(rows_RD.dtype, torch.float32)  # as on a CPU anyway
        sums_ND = rows_RD.new_zeros(num_tokens, rows_RD.shape[1], dtype=wide)
        return sums_ND.index_add_(0, tokens_R, rows_RD.to(wide)).to(rows_RD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (tokens_R,) = ctx.saved_tensors
        return grad_ND.index_select(0, tokens_R), None, None


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


@dataclass(frozen=True)
class Traffic:
    """What one pass sends to other ranks.

    Attributes:
        forward: bytes of hidden states, weights and outputs.
        backward: bytes of their gradients.
        indices: bytes that say where they belong, in the forward pass.
    """

    forward: int
    backward: int
    indices: int


def compute_shared(
    x_ND: Tensor,
    selection: Selection,
    blocks_per_rank: int,
    group: dist.ProcessGroup,
    compute: Callable[[Tensor, Selection], Tensor],
) -> tuple[Tensor, Traffic]:
    """The sum over each token's blocks, wherever these are.

    The host waits for the device once, to read how much travels to and from each rank; the
    backward pass does not wait.

    Args:
        selection: by numbers that count over all ranks.
        compute: gives (R, D) for rows (R, D) and a selection among this rank's own blocks.

    Returns:
        (N, D), and what was sent for it.
    """
    me, ranks = dist.get_rank(group), dist.get_world_size(group)
    num_tokens, width = x_ND.shape
    blocks_P = selection.blocks.flatten()
    owners_P = blocks_P.div(blocks_per_rank, rounding_mode="floor")
    if selection.kept is not None:
        # Pairs that are not kept go to no rank. To drop them here would wait for their number.
        owners_P = owners_P.masked_fill(~selection.kept.flatten(), ranks)
    # Pairs by the rank they go to, in the order of the tokens; those that go to none are last.
    # 16-bit keys, enough for 32,767 ranks, sort several times faster than 64-bit ones.
    owners_P, pairs_P = owners_P.to(torch.int16).sort(stable=True)
    owners_P = owners_P.long()
    tokens_P = pairs_P.div(max(selection.blocks.shape[1], 1), rounding_mode="floor")
    rows_P, slots_P = _runs(owners_P * num_tokens + tokens_P)
    edges = torch.searchsorted(owners_P, torch.arange(ranks + 1, device=x_ND.device))
    first_rows = F.pad(rows_P + 1, (1, 0))[edges]
    most_M = edges.new_zeros(ranks + 1).scatter_reduce_(0, owners_P, slots_P + 1, "amax")[:-1]
    sent_M3 = torch.stack([first_rows.diff(), edges.diff(), most_M], dim=1)
    received_M3 = torch.empty_like(sent_M3)
    dist.all_to_all_single(received_M3, sent_M3, group=group)
    sizes = torch.stack([sent_M3.t(), received_M3.t()]).tolist()
    (sent_rows, sent_pairs, _), (rows, pairs, most) = sizes

    owners_P, pairs_P, tokens_P, rows_P = (
        t[: sum(sent_pairs)] for t in (owners_P, pairs_P, tokens_P, rows_P)
    )
    tokens_R = tokens_P.new_empty(sum(sent_rows)).scatter_(0, rows_P, tokens_P)
    own_rows_P = rows_P - first_rows[owners_P]  # among those that go to a rank
    own_blocks_P = blocks_P[pairs_P] - owners_P * blocks_per_rank
    where_P2 = torch.stack([own_rows_P, own_blocks_P], dim=1).int()
    where_Q2 = _all_to_all(where_P2, sent_pairs, pairs, group)
    x_RD = _Exchange.apply(x_ND.index_select(0, tokens_R), sent_rows, rows, group)
    weights_Q = None
    if selection.weights is not None:
        weights_P = selection.weights.to(x_ND.dtype).flatten().index_select(0, pairs_P)
        weights_Q = _Exchange.apply(weights_P, sent_pairs, pairs, group)
    mine = _selection_of(where_Q2.long(), received_M3, (sum(rows), max(1, *most)), weights_Q)
    y_RD = _Exchange.apply(compute(x_RD, mine), rows, sent_rows, group)
    output_ND = _SumByToken.apply(y_RD, tokens_R, num_tokens)

    def to_others(counts: list[int]) -> int:
        return sum(counts) - counts[me]

    rows_both_ways = (to_others(sent_rows) + to_others(rows)) * width
    weighed = weights_Q is not None
    indices = 2 * INDEX_BYTES * to_others(sent_pairs)
    traffic = Traffic(
        forward=(rows_both_ways + weighed * to_others(sent_pairs)) * x_ND.element_size(),
        backward=(rows_both_ways + weighed * to_others(pairs)) * x_ND.element_size(),
        indices=indices + (ranks - 1) * SIZES_BYTES,
    )
    return output_ND, traffic


def _runs(keys_P: Tensor) -> tuple[Tensor, Tensor]:
    """The runs of equal ones among sorted keys that are not negative.

    Returns:
        Number of the run of each key, and its place in the run: (P,) int64 each.
    """
    places_P = torch.arange(len(keys_P), device=keys_P.device)
    begins_P = keys_P.diff(prepend=keys_P.new_full((1,), -1)) != 0
    starts_P = places_P.masked_fill(~begins_P, 0).cummax(dim=0).values
    return begins_P.cumsum(dim=0) - 1, places_P - starts_P


def _selection_of(
    where_Q2: Tensor, received_M3: Tensor, shape: tuple[int, int], weights_Q: Tensor | None
) -> Selection:
    """What was received as a selection: rows use differently many blocks, so that the rest of each
    is not kept.

    Args:
        where_Q2: row among those of its rank, and block, of each pair.
        received_M3: how many rows and pairs came from each rank.
        shape: the number of rows, and the most pairs of one.
    """
    rows_M, pairs_M, _ = received_M3.unbind(dim=1)
    first_M = rows_M.cumsum(dim=0) - rows_M  # row of each rank
    rows_Q = where_Q2[:, 0] + first_M.repeat_interleave(pairs_M, output_size=len(where_Q2))
    _, slots_Q = _runs(rows_Q)  # the pairs of a row came one after the other
    blocks_RA = where_Q2.new_zeros(shape)
    blocks_RA[rows_Q, slots_Q] = where_Q2[:, 1]
    counts_R = rows_Q.new_zeros(shape[0]).scatter_add_(0, rows_Q, torch.ones_like(rows_Q))
    kept_RA = torch.arange(shape[1], device=rows_Q.device) < counts_R.unsqueeze(1)
    weights_RA = None
    if weights_Q is not None:
        weights_RA = weights_Q.new_zeros(shape).index_put((rows_Q, slots_Q), weights_Q)
    return Selection(blocks_RA, weights=weights_RA, kept=kept_RA, num_kept=len(where_Q2))
