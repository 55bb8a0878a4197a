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
from torch import Tensor

from .renamed import all_gather_single, reduce_scatter_single
from .selection import Selection

INDEX_BYTES = 4
"""Of each of the two numbers that tell a rank which row uses which of its blocks."""


@dataclass(frozen=True)
class Sharing:
    """With which other processes a memory shares its tokens and its blocks.

    Attributes:
        tokens: the group whose tokens are one micro-batch to the balance loss, or ``None``.
        blocks: the group over which the blocks are sharded, equally many consecutive ones to a
            rank, or ``None``. All its ranks must call the memory together.
    """

    tokens: dist.ProcessGroup | None = None
    blocks: dist.ProcessGroup | None = None

    # A copy in the same process shares as well; one that goes elsewhere does not.
    def __deepcopy__(self, memo: Any) -> Sharing:
        return self

    def __reduce__(self) -> tuple[type[Sharing], tuple[()]]:
        return Sharing, ()

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
        n, ...), and which of them are this rank's. No gradients."""
        if self.tokens is None:
            return rows, slice(0, len(rows))
        ranks, me = dist.get_world_size(self.tokens), dist.get_rank(self.tokens)
        counts_R = torch.zeros(ranks, dtype=torch.int64, device=rows.device)
        own = torch.tensor([len(rows)], device=rows.device)
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

    Args:
        selection: by numbers that count over all ranks.
        compute: gives (R, D) for rows (R, D) and a selection among this rank's own blocks.

    Returns:
        (N, D), and what was sent for it.
    """
    me, ranks = dist.get_rank(group), dist.get_world_size(group)
    num_tokens, width = x_ND.shape
    blocks_P, kept_P = selection.blocks.flatten(), selection.kept
    pairs_P = torch.arange(len(blocks_P), device=x_ND.device)
    if kept_P is not None:
        pairs_P = kept_P.flatten().nonzero().squeeze(1)
        blocks_P = blocks_P[pairs_P]
    owners_P = blocks_P.div(blocks_per_rank, rounding_mode="floor")
    tokens_P = pairs_P.div(max(selection.blocks.shape[1], 1), rounding_mode="floor")
    # Pairs by the rank they go to, in the order of the tokens.
    order_P = owners_P.sort(stable=True).indices
    pairs_P, blocks_P, owners_P, tokens_P = (
        t[order_P] for t in (pairs_P, blocks_P, owners_P, tokens_P)
    )
    visits_MN = torch.zeros(ranks, num_tokens, dtype=torch.bool, device=x_ND.device)
    visits_MN[owners_P, tokens_P] = True
    tokens_R = visits_MN.nonzero()[:, 1]
    rows_P = (visits_MN.cumsum(dim=1) - 1)[owners_P, tokens_P]  # among those that go to a rank
    sent_M2 = torch.stack([visits_MN.sum(dim=1), owners_P.bincount(minlength=ranks)], dim=1)
    received_M2 = torch.empty_like(sent_M2)
    dist.all_to_all_single(received_M2, sent_M2, group=group)
    sent_rows, sent_pairs = sent_M2.t().tolist()
    rows, pairs = received_M2.t().tolist()

    where_P2 = torch.stack([rows_P, blocks_P - owners_P * blocks_per_rank], dim=1).int()
    where_Q2 = _all_to_all(where_P2, sent_pairs, pairs, group)
    x_RD = _Exchange.apply(x_ND.index_select(0, tokens_R), sent_rows, rows, group)
    weights_Q = None
    if selection.weights is not None:
        weights_P = selection.weights.to(x_ND.dtype).flatten().index_select(0, pairs_P)
        weights_Q = _Exchange.apply(weights_P, sent_pairs, pairs, group)
    mine = _selection_of(where_Q2.long(), rows, pairs, weights_Q)
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
        indices=indices + (ranks - 1) * 2 * sent_M2.element_size(),
    )
    return output_ND, traffic


def _selection_of(
    where_Q2: Tensor, rows: list[int], pairs: list[int], weights_Q: Tensor | None
) -> Selection:
    """What was received as a selection: rows use differently many blocks, so that the rest of each
    is not kept."""
    device = where_Q2.device
    first = torch.tensor([0, *rows[:-1]], device=device).cumsum(0)  # row of each rank
    rows_Q = where_Q2[:, 0] + first.repeat_interleave(
        torch.tensor(pairs, device=device), output_size=len(where_Q2)
    )
    counts_R = rows_Q.bincount(minlength=sum(rows))
    # The pairs of a row came one after the other.
    slots_Q = torch.arange(len(rows_Q), device=device) - (counts_R.cumsum(0) - counts_R)[rows_Q]
    most = int(counts_R.max()) if len(counts_R) else 1
    shape = len(counts_R), max(most, 1)
    blocks_RA = where_Q2.new_zeros(shape)
    blocks_RA[rows_Q, slots_Q] = where_Q2[:, 1]
    kept_RA = torch.arange(shape[1], device=device) < counts_R.unsqueeze(1)
    weights_RA = None
    if weights_Q is not None:
        weights_RA = weights_Q.new_zeros(shape).index_put((rows_Q, slots_Q), weights_Q)
    return Selection(blocks_RA, weights=weights_RA, kept=kept_RA, padded=True)
