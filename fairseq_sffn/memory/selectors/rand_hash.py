"""RandHash: random, fixed blocks for each token id."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import MemoryConfig
from ..selection import Selection, Selector, SelectorInput
from .hash_layer import check_token_ids


class RandHash(Selector):
    """b distinct random blocks for each token id (Liu et al. 2023, arXiv 2305.13999).

    The table is a buffer: checkpoints store it, so that token ids keep their blocks. It has b
    entries of 2 or 4 bytes for each token id.
    """

    name = "rand_hash"
    scores_blocks = False

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None
        self.table: Tensor
        self.register_buffer(
            "table", random_blocks(config.vocab_size, config.num_blocks, config.active_blocks)
        )

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 64

    @classmethod
    def context_tokens(cls, config: MemoryConfig) -> int:
        return 1

    def forward(self, inputs: SelectorInput) -> Selection:
        assert inputs.token_ids is not None
        check_token_ids(inputs.token_ids, len(self.table))
        return Selection(self.table[inputs.token_ids[:, 0]].long())


def random_blocks(vocab_size: int, num_blocks: int, active_blocks: int) -> Tensor:
    """Draw distinct blocks for each token id: (V, A) int16, or int32 for more than 2^15 blocks."""
    dtype = torch.int16 if num_blocks <= 2**15 else torch.int32
    table_VA = torch.empty(vocab_size, active_blocks, dtype=dtype)
    # A few rows at a time, since each row takes a random number for every block.
    for rows in table_VA.split(max(1, 2**22 // num_blocks)):
        rows.copy_(torch.rand(len(rows), num_blocks).topk(active_blocks).indices)
    return table_VA
