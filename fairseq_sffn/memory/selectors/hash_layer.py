"""Hash layer: selects a block by token id."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..config import MemoryConfig
from ..selection import Selection, Selector, SelectorConfig, SelectorInput
from ..validation import ConfigError


class HashLayer(Selector):
    """One block for each token id, or for each bigram of token ids, by a fixed table.

    Roller et al. 2021 (arXiv 2106.04426, section 3). The table is a buffer: checkpoints store it,
    so that token ids keep their block.
    """

    name = "hash_layer"
    flag_prefix = "hash"
    scores_blocks = False

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        table: Literal["random", "balanced", "bigram"] = field(
            default="random",
            metadata={
                "help": "table from token id to block: 'random'; 'balanced', which balances the "
                "load by the token counts of --hash-counts; or 'bigram', random by the id and "
                "the id before it"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        options = config.selector_options
        assert config.vocab_size is not None
        if options.table == "balanced":
            assert config.token_counts is not None
            table = balanced_table(config.token_counts, config.num_blocks)
        else:
            rows = (2,) if options.table == "bigram" else ()
            table = torch.randint(config.num_blocks, (*rows, config.vocab_size))
        self.num_blocks = config.num_blocks
        self.table: Tensor
        self.register_buffer("table", table)

    @classmethod
    def context_tokens(cls, config: MemoryConfig) -> int:
        return 2 if config.selector_options.table == "bigram" else 1

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        if config.active_blocks != 1:
            raise ConfigError("active_blocks", config.active_blocks, "hash_layer uses one block")
        if config.selector_options.table == "balanced":
            if config.token_counts is None:
                reason = "needs the counts of the tokens (MemoryConfig.token_counts)"
                raise ConfigError("table", "balanced", reason)
            check_token_counts(config)

    def forward(self, inputs: SelectorInput) -> Selection:
        assert inputs.token_ids is not None
        check_token_ids(inputs.token_ids, self.table.shape[-1])
        if self.table.ndim == 1:
            return Selection(self.table[inputs.token_ids])
        # Tabulation hashing: any three bigrams get independent, uniform blocks, without a table of
        # all bigrams (Carter and Wegman 1979).
        before_N, current_N = inputs.token_ids.unbind(dim=1)
        blocks_N = (self.table[0, before_N] + self.table[1, current_N]) % self.num_blocks
        return Selection(blocks_N.unsqueeze(1))


def check_token_counts(config: MemoryConfig) -> None:
    """Raise ConfigError if the vocabulary and its counts differ in length."""
    assert config.token_counts is not None
    if len(config.token_counts) != config.vocab_size:
        reason = f"there are {len(config.token_counts)} token counts"
        raise ConfigError("vocab_size", config.vocab_size, reason)


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ConfigError if a token id is outside the vocabulary."""
    # Accelerators and compiled graphs check indices themselves. Reading a number would make the
    # host wait, or break the graph.
    if torch.compiler.is_compiling() or token_ids.device.type != "cpu":
        return
    if token_ids.numel():
        low, high = token_ids.aminmax()
        if low < 0 or high >= vocab_size:
            bad = int(low if low < 0 else high)
            raise ConfigError("vocab_size", vocab_size, f"got the token id {bad}")


def balanced_table(counts: Sequence[int], num_blocks: int) -> Tensor:
    """Distribute token ids so that the blocks get similar numbers of training tokens.

    Greedy: in the order of their frequency, ids go to the block with the lowest load so far (Roller
    et al. 2021, section 3.1, balanced assignment). Ids that never occur go to the block with the
    fewest ids.

    Args:
        counts: (V,) occurrences of each token id.
        num_blocks: B.

    Returns:
        (V,) int64, the block of each token id.
    """
    table_V = torch.empty(len(counts), dtype=torch.int64, device="cpu")
    by_frequency = sorted(range(len(counts)), key=lambda token: -counts[token])
    occurring = [token for token in by_frequency if counts[token]]
    loads = [(0, block) for block in range(num_blocks)]
    for token in occurring:
        load, block = loads[0]
        table_V[token] = block
        heapq.heapreplace(loads, (load + counts[token], block))
    ids = torch.bincount(table_V[occurring], minlength=num_blocks).tolist()
    sizes = sorted((size, block) for block, size in enumerate(ids))
    for token in by_frequency[len(occurring) :]:
        size, block = sizes[0]
        table_V[token] = block
        heapq.heapreplace(sizes, (size + 1, block))
    return table_V
