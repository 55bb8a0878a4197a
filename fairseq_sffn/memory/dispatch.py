"""Tokens to the ranks that hold their blocks, and outputs back.

Each rank selects the blocks of its own tokens. :func:`dispatch` sends each token to the ranks that
hold its blocks, once to a rank, however many of that rank's blocks it uses. Each rank computes the
tokens that it received, and :func:`combine` returns the outputs and sums them by token. Nothing is
dropped or padded to a capacity (as in Gale et al. 2022, arXiv 2211.15841). The communication
pattern is that of Lepikhin et al. 2020 (arXiv 2006.16668, section 3.2), with uneven splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .selection import Selection

INDEX_BYTES = 4
"""Bytes of each routing index. An assignment has two: its row and its block (int32)."""

SIZES_BYTES = 3 * torch.int64.itemsize
"""Bytes that announce to a rank the number of rows, of assignments, and the maximum per row."""


@dataclass(frozen=True)
class Traffic:
    """What one pass sends to other ranks.

    Attributes:
        forward: bytes of hidden states, weights and outputs.
        backward: bytes of their gradients.
        indices: bytes of sizes and routing indices, in the forward pass.
    """

    forward: int
    backward: int
    indices: int

    def sent_bytes(self, training: bool) -> int:
        """Return the bytes of a training step or of an evaluation."""
        sent = self.forward + self.indices
        if training and not torch.is_grad_enabled():
            sent *= 2  # activation checkpointing repeats the forward pass, with gradients
        return sent + training * self.backward


@dataclass(frozen=True)
class Dispatched:
    """The tokens that this rank received, and what :func:`combine` needs to return them.

    Attributes:
        x_RD: hidden states of the received tokens.
        selection: their assignments to this rank's blocks, numbered from 0.
        tokens_R: (rows sent,) the token of each row that this rank sent.
        num_tokens: N.
        sent_rows, received_rows: number of rows to and from each rank.
        group: the ranks over which the blocks are sharded.
        traffic: bytes sent to other ranks by dispatch and combine.
    """

    x_RD: Tensor
    selection: Selection
    tokens_R: Tensor
    num_tokens: int
    sent_rows: list[int]
    received_rows: list[int]
    group: dist.ProcessGroup
    traffic: Traffic


def dispatch(
    x_ND: Tensor, selection: Selection, blocks_per_rank: int, group: dist.ProcessGroup
) -> Dispatched:
    """Send each token to the ranks that hold its blocks.

    The host waits for the device once, to read how many rows travel to and from each rank. The
    backward pass does not wait.

    Args:
        x_ND: hidden states of this rank's tokens.
        selection: their blocks, numbered over all ranks.
        blocks_per_rank: number of consecutive blocks that each rank holds.
        group: the ranks.

    Returns:
        The tokens of all ranks that use this rank's blocks.
    """
    ranks = dist.get_world_size(group)
    num_tokens, width = x_ND.shape

    # Sort the assignments by the rank that holds their block, then by token.
    blocks_P = selection.blocks.flatten()
    owners_P = blocks_P.div(blocks_per_rank, rounding_mode="floor")
    if selection.kept is not None:
        # Dropped assignments go to no rank and are sorted last. Removing them here would make the
        # host wait for their number.
        owners_P = owners_P.masked_fill(~selection.kept.flatten(), ranks)
    # 16-bit keys, enough for 32,767 ranks, sort several times faster than 64-bit keys.
    owners_P, order_P = owners_P.to(torch.int16).sort(stable=True)
    owners_P = owners_P.long()
    tokens_P = order_P.div(max(selection.blocks.shape[1], 1), rounding_mode="floor")

    # A row is one token for one rank. Tell each rank the number of rows and of assignments, and the
    # maximum number of assignments of a row.
    rows_P, slots_P = _runs(owners_P * num_tokens + tokens_P)
    edges = torch.searchsorted(owners_P, torch.arange(ranks + 1, device=x_ND.device))
    first_rows = F.pad(rows_P + 1, (1, 0))[edges]
    most_M = edges.new_zeros(ranks + 1).scatter_reduce_(0, owners_P, slots_P + 1, "amax")[:-1]
    sent_M3 = torch.stack([first_rows.diff(), edges.diff(), most_M], dim=1)
    received_M3 = torch.empty_like(sent_M3)
    dist.all_to_all_single(received_M3, sent_M3, group=group)
    sent, received = torch.stack([sent_M3.t(), received_M3.t()]).tolist()
    sent_rows, sent_assignments, _ = sent
    received_rows, received_assignments, most = received

    # Send the routing indices, the rows and the weights.
    owners_P, order_P, tokens_P, rows_P = (
        t[: sum(sent_assignments)] for t in (owners_P, order_P, tokens_P, rows_P)
    )
    tokens_R = tokens_P.new_empty(sum(sent_rows)).scatter_(0, rows_P, tokens_P)
    rows_of_owner_P = rows_P - first_rows[owners_P]
    blocks_of_owner_P = blocks_P[order_P] - owners_P * blocks_per_rank
    indices_P2 = torch.stack([rows_of_owner_P, blocks_of_owner_P], dim=1).int()
    indices_Q2 = _all_to_all(indices_P2, sent_assignments, received_assignments, group)
    x_RD = _AllToAll.apply(x_ND.index_select(0, tokens_R), sent_rows, received_rows, group)
    weights_Q = None
    if selection.weights is not None:
        weights_P = selection.weights.to(x_ND.dtype).flatten().index_select(0, order_P)
        weights_Q = _AllToAll.apply(weights_P, sent_assignments, received_assignments, group)

    shape = sum(received_rows), max(1, *most)
    received_selection = _selection_of(indices_Q2.long(), received_M3, shape, weights_Q)
    me, itemsize = dist.get_rank(group), x_ND.element_size()

    def to_others(counts: list[int]) -> int:
        return sum(counts) - counts[me]

    rows_bytes = (to_others(sent_rows) + to_others(received_rows)) * width * itemsize
    weight_bytes = 0 if weights_Q is None else itemsize
    traffic = Traffic(
        forward=rows_bytes + weight_bytes * to_others(sent_assignments),
        backward=rows_bytes + weight_bytes * to_others(received_assignments),
        indices=2 * INDEX_BYTES * to_others(sent_assignments) + (ranks - 1) * SIZES_BYTES,
    )
    return Dispatched(
        *(x_RD, received_selection, tokens_R, num_tokens),
        *(sent_rows, received_rows, group, traffic),
    )


def combine(y_RD: Tensor, dispatched: Dispatched) -> Tensor:
    """Return the outputs to the ranks of their tokens, and sum them by token.

    Args:
        y_RD: outputs of the received tokens, from this rank's blocks.
        dispatched: what :func:`dispatch` returned.

    Returns:
        (N, D) outputs of this rank's tokens.
    """
    sent, received, group = dispatched.received_rows, dispatched.sent_rows, dispatched.group
    own_y_RD = _AllToAll.apply(y_RD, sent, received, group)
    return _SumByToken.apply(own_y_RD, dispatched.tokens_R, dispatched.num_tokens)


def _runs(keys_P: Tensor) -> tuple[Tensor, Tensor]:
    """Find the runs of equal numbers in sorted, non-negative keys.

    Returns:
        (P,) int64, the number of each key's run, and (P,) int64, its position in the run.
    """
    places_P = torch.arange(len(keys_P), device=keys_P.device)
    begins_P = keys_P.diff(prepend=keys_P.new_full((1,), -1)) != 0
    starts_P = places_P.masked_fill(~begins_P, 0).cummax(dim=0).values
    return begins_P.cumsum(dim=0) - 1, places_P - starts_P


def _selection_of(
    indices_Q2: Tensor, received_M3: Tensor, shape: tuple[int, int], weights_Q: Tensor | None
) -> Selection:
    """Build a selection from the received routing indices.

    Rows have different numbers of assignments; unused slots have ``kept`` ``False``.

    Args:
        indices_Q2: row, counted from the first row of its rank, and block of each assignment.
        received_M3: number of rows and assignments from each rank.
        shape: number of rows, and maximum number of assignments of a row.
        weights_Q: weights of the assignments, or ``None``.
    """
    rows_M, assignments_M, _ = received_M3.unbind(dim=1)
    first_M = rows_M.cumsum(dim=0) - rows_M
    size = len(indices_Q2)
    rows_Q = indices_Q2[:, 0] + first_M.repeat_interleave(assignments_M, output_size=size)
    _, slots_Q = _runs(rows_Q)  # the assignments of a row are adjacent
    blocks_RA = indices_Q2.new_zeros(shape)
    blocks_RA[rows_Q, slots_Q] = indices_Q2[:, 1]
    counts_R = rows_Q.new_zeros(shape[0]).scatter_add_(0, rows_Q, torch.ones_like(rows_Q))
    kept_RA = torch.arange(shape[1], device=rows_Q.device) < counts_R.unsqueeze(1)
    weights_RA = None
    if weights_Q is not None:
        weights_RA = weights_Q.new_zeros(shape).index_put((rows_Q, slots_Q), weights_Q)
    return Selection(blocks_RA, weights=weights_RA, kept=kept_RA, num_kept=size)


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


class _AllToAll(torch.autograd.Function):
    """Sends rows to each rank and receives rows; gradients travel the other way."""

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
    """Sums rows by token, as ``index_add`` does, which would save the rows for backward."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, tokens_R: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(tokens_R)
        wide = torch.promote_types(rows_RD.dtype, torch.float32)  # index_add's dtype on a CPU
        sums_ND = rows_RD.new_zeros(num_tokens, rows_RD.shape[1], dtype=wide)
        return sums_ND.index_add_(0, tokens_R, rows_RD.to(wide)).to(rows_RD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (tokens_R,) = ctx.saved_tensors
        return grad_ND.index_select(0, tokens_R), None, None
