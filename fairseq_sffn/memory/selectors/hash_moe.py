"""Hash-MoE: blocks by token id, weights by a learned router."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import MemoryConfig
from ..selection import Selection, SelectorInput
from ..validation import ConfigError
from .hash_layer import check_token_counts, check_token_ids
from .learned_gate import LearnedGate

CANDIDATES = 2
"""Random blocks from which one with a low load is chosen: enough for loads as even as the counts
allow, and few enough for different ids to share different blocks."""


class HashMoE(LearnedGate):
    """b distinct blocks for each token id by a fixed table, weighted by a learned linear gate.

    The first sparse layers of DeepSeek-V4 (``DeepseekV4HashRouter`` of transformers). The table
    balances the load by the token counts of the training data. It is a buffer: checkpoints store
    it. By default the weight of a block is sqrt(softplus(score)) over the sum for the selected
    blocks. The scores do not select, so that no balance loss can change the load.
    """

    name = "hash_moe"
    default_gate = "sqrt_softplus_renormalized"
    selects_by_scores = False

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        assert config.token_counts is not None
        self.table: Tensor
        self.register_buffer(
            "table", balanced_blocks(config.token_counts, config.num_blocks, config.active_blocks)
        )

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 64

    @classmethod
    def context_tokens(cls, config: MemoryConfig) -> int:
        return 1

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        if config.token_counts is None:
            reason = "hash_moe balances its table by the counts of the tokens, and needs them"
            raise ConfigError("token_counts", None, reason)
        check_token_counts(config)

    def forward(self, inputs: SelectorInput) -> Selection:
        assert inputs.token_ids is not None
        check_token_ids(inputs.token_ids, len(self.table))
        return Selection(self.table[inputs.token_ids[:, 0]].long(), self.scores(inputs))


def balanced_blocks(counts: Sequence[int], num_blocks: int, active_blocks: int) -> Tensor:
    """Draw distinct blocks for each token id, such that blocks get similar numbers of tokens.

    In the order of their frequency, ids take the blocks with the lowest load so far among twice as
    many random blocks. For ids that never occur, the load is the number of ids.

    Args:
        counts: (V,) occurrences of each token id.
        num_blocks: B.
        active_blocks: A.

    Returns:
        (V, A) int16, or int32 for more than 2^15 blocks.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (), device="cpu")))
    counts_V = np.asarray(counts, dtype=np.int64)
    table_VA = np.empty(
        (len(counts_V), active_blocks), np.int16 if num_blocks <= 2**15 else np.int32
    )
    loads_B, ids_B = np.zeros(num_blocks, np.int64), np.zeros(num_blocks, np.int64)
    drawn = min(CANDIDATES * active_blocks, num_blocks)
    for token in np.argsort(-counts_V, kind="stable"):
        candidates = rng.choice(num_blocks, drawn, replace=False, shuffle=False)
        loads = (loads_B if counts_V[token] else ids_B)[candidates]
        blocks_A = candidates[np.argpartition(loads, active_blocks - 1)[:active_blocks]]
        table_VA[token] = blocks_A
        loads_B[blocks_A] += counts_V[token]
        ids_B[blocks_A] += 1
    return torch.from_numpy(table_VA)
