"""The order in which (token, block) pairs are computed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive pairs that are multiplied at once, and the consecutive blocks they belong to.

    Attributes:
        pairs: slice of the sorted pairs.
        blocks: slice of the blocks.
        ends: (blocks in the chunk,) int32, for each block the end of its pairs, counted from the
            start of the chunk.
        sizes: how many pairs each block has in the chunk.
        continues: whether the first block has pairs in the chunk before, too.
    """

    pairs: slice
    blocks: slice
    ends: Tensor
    sizes: list[int]
    continues: bool = False


@dataclass(frozen=True)
class Plan:
    """Pairs sorted by block: as much of it as backward needs.

    Attributes:
        tokens: (P,) int32 token n of each sorted pair.
        ends: (B,) int32, for each block the end of its pairs.
        chunks: cover all pairs in order.
    """

    tokens: Tensor
    ends: Tensor
    chunks: list[Chunk]

    @property
    def blocks(self) -> Tensor:
        """(P,) int32 block of each sorted pair."""
        all_blocks = torch.arange(len(self.ends), device=self.ends.device, dtype=torch.int32)
        loads = self.ends.diff(prepend=self.ends.new_zeros(1))
        return all_blocks.repeat_interleave(loads, output_size=len(self.tokens))


def make_plan(
    blocks_NA: Tensor, num_blocks: int, chunk_pairs: int, kept_NA: Tensor | None = None
) -> tuple[Tensor, Plan]:
    """Sort pairs by block and cut them into chunks, whose sizes are read from the device.

    Args:
        blocks_NA: selected blocks.
        num_blocks: B.
        chunk_pairs: the most pairs in a chunk.
        kept_NA: pairs to leave out are ``False``.

    Returns:
        (P,) index n * A + a of each sorted pair, and the plan.
    """
    sorted_P, order_P = sort_blocks(blocks_NA.flatten(), num_blocks)
    if kept_NA is not None:
        kept_P = kept_NA.flatten()[order_P]
        sorted_P, order_P = sorted_P[kept_P], order_P[kept_P]
    all_blocks = torch.arange(num_blocks, device=sorted_P.device, dtype=sorted_P.dtype)
    ends_B = torch.searchsorted(sorted_P, all_blocks, right=True).int()
    tokens_P = order_P.int().div(max(blocks_NA.shape[1], 1), rounding_mode="floor")
    return order_P, Plan(tokens_P, ends_B, _chunks(ends_B, len(order_P), chunk_pairs))


def sort_blocks(blocks_P: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The block numbers in order, in a narrow dtype, and where each of them was: (P,) both."""
    # 16-bit keys sort several times faster than 64-bit ones.
    narrow = torch.int16 if num_blocks < 2**15 else torch.int32
    return blocks_P.to(narrow).sort(stable=True)


def _chunks(ends_B: Tensor, num_pairs: int, chunk_pairs: int) -> list[Chunk]:
    if num_pairs == 0:
        return []
    starts = torch.arange(0, num_pairs, chunk_pairs)
    stops = (starts + chunk_pairs).clamp(max=num_pairs)
    ends_B = ends_B.cpu()
    # A block that is longer than a chunk spreads over several: its first and last pairs differ.
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
