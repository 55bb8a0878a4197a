"""The groups of ranks that share a memory's tokens and blocks, and their collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .renamed import all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class ProcessGroups:
    """The ranks with which a memory shares its tokens and its blocks.

    Attributes:
        tokens: ranks whose tokens are one micro-batch for the balance loss, or ``None``.
        blocks: ranks over which the blocks are sharded, or ``None``. Each rank holds the same
            number of consecutive blocks. All ranks must call the memory together.
    """

    tokens: dist.ProcessGroup | None = None
    blocks: dist.ProcessGroup | None = None

    # A copy in this process keeps the groups. A pickle loses them: groups belong to a process.
    def __deepcopy__(self, memo: Any) -> ProcessGroups:
        return self

    def __reduce__(self) -> tuple[type[ProcessGroups], tuple[()]]:
        return ProcessGroups, ()

    @property
    def shards(self) -> int:
        """Number of ranks over which the blocks are sharded."""
        return 1 if self.blocks is None else dist.get_world_size(self.blocks)

    @property
    def shard(self) -> int:
        """Index of the shard that this rank holds."""
        return 0 if self.blocks is None else dist.get_rank(self.blocks)

    def part_of(self, rows: int) -> slice:
        """Return the rows that this rank holds of a table with ``rows`` rows."""
        each = rows // self.shards
        return slice(self.shard * each, (self.shard + 1) * each)

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate the shards of all ranks: (R, ...) -> (shards * R, ...), with gradients."""
        if self.blocks is None:
            return part
        return _Gather.apply(part, self.blocks)

    def gather_tokens(self, rows: Tensor) -> tuple[Tensor, slice]:
        """Concatenate the rows of the ranks that share tokens, without gradients.

        The host waits for the device once, to read the number of rows of each rank.

        Args:
            rows: (n, ...), where n may differ between ranks.

        Returns:
            (sum of n, ...), and the slice of it that holds this rank's rows.
        """
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
        """Stack the values of the ranks that share tokens, without gradients or waiting.

        Args:
            values: (...), of the same shape on each rank.

        Returns:
            (ranks, ...).
        """
        if self.tokens is None:
            return values.unsqueeze(0)
        stacked = values.new_empty(dist.get_world_size(self.tokens), *values.shape)
        all_gather_single(stacked, values.detach().unsqueeze(0).contiguous(), group=self.tokens)
        return stacked

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum the values of the ranks that share tokens; gradients reach all of them."""
        if self.tokens is None:
            return values
        return _Sum.apply(values, self.tokens)


# torch.distributed.nn has such functions, but is deprecated, and fails in a gloo group without
# rank 0.


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
