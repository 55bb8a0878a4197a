"""Assignments sorted by block and cut into chunks of bounded size, for CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive sorted assignments that are multiplied together, and the blocks they use.

    Attributes:
        assignments: slice of the sorted assignments.
        blocks: slice of the blocks.
        ends: (blocks in the chunk,) int32, the end of each block's assignments, relative to the
            start of the chunk.
        sizes: number of assignments of each block in the chunk.
        continues: whether the previous chunk also has assignments of the first block.
    """

    assignments: slice
    blocks: slice
    ends: Tensor
    sizes: list[int]
    continues: bool = False


@dataclass(frozen=True)
class ChunkedAssignments:
    """Assignments sorted by block, as far as the backward pass needs them.

    Attributes:
        tokens: (P,) int32, the token n of each sorted assignment.
        ends: (B,) int32, the end of each block's assignments.
        chunks: cover all assignments in order.
    """

    tokens: Tensor
    ends: Tensor
    chunks: list[Chunk]

    @property
    def blocks(self) -> Tensor:
        """(P,) int32, the block of each sorted assignment."""
        all_blocks = torch.arange(len(self.ends), device=self.ends.device, dtype=torch.int32)
        loads = self.ends.diff(prepend=self.ends.new_zeros(1))
        return all_blocks.repeat_interleave(loads, output_size=len(self.tokens))


def chunk_assignments(
    blocks_NA: Tensor, num_blocks: int, chunk_size: int, kept_NA: Tensor | None = None
) -> tuple[Tensor, ChunkedAssignments]:
    """Sort the assignments by block and cut them into chunks.

    The host reads the chunk sizes from the device, and waits for it.

    Args:
        blocks_NA: selected blocks.
        num_blocks: B.
        chunk_size: maximum number of assignments in a chunk.
        kept_NA: bool; assignments with ``False`` are left out.

    Returns:
        (P,) the index n * A + a of each sorted assignment, and the chunks.
    """
    sorted_P, order_P = sort_blocks(blocks_NA.flatten(), num_blocks)
    if kept_NA is not None:
        kept_P = kept_NA.flatten()[order_P]
        sorted_P, order_P = sorted_P[kept_P], order_P[kept_P]
    all_blocks = torch.arange(num_blocks, device=sorted_P.device, dtype=sorted_P.dtype)
    ends_B = torch.searchsorted(sorted_P, all_blocks, right=True).int()
    tokens_P = order_P.int().div(max(blocks_NA.shape[1], 1), rounding_mode="floor")
    chunks = _chunks(ends_B, len(order_P), chunk_size)
    return order_P, ChunkedAssignments(tokens_P, ends_B, chunks)


def sort_blocks(blocks_P: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort block numbers, stably.

    Returns:
        (P,) the sorted numbers in a narrow dtype, and (P,) their previous positions.
    """
    # 16-bit keys sort several times faster than 64-bit keys.
    narrow = torch.int16 if num_blocks < 2**15 else torch.int32
    return blocks_P.to(narrow).sort(stable=True)


def _chunks(ends_B: Tensor, num_assignments: int, chunk_size: int) -> list[Chunk]:
    if num_assignments == 0:
        return []
    starts = torch.arange(0, num_assignments, chunk_size)
    stops = (starts + chunk_size).clamp(max=num_assignments)
    ends_B = ends_B.cpu()
    # A block with more assignments than a chunk holds spreads over several chunks.
    firsts = torch.searchsorted(ends_B, starts.int(), right=True)
    lasts = torch.searchsorted(ends_B, stops.int())
    chunks: list[Chunk] = []
    for start, stop, first, last in zip(
        starts.tolist(), stops.tolist(), firsts.tolist(), lasts.tolist(), strict=True
    ):
        ends = ends_B[first : last + 1].clamp(max=stop) - start
        sizes = [end - begin for begin, end in pairwise([0, *ends.tolist()])]
        continues = bool(chunks) and chunks[-1].blocks.stop == first + 1
        chunks.append(Chunk(slice(start, stop), slice(first, last + 1), ends, sizes, continues))
    return chunks
