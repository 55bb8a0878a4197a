"""Bytes that a rank sends in an update on one micro-batch: for the tokens that travel to the blocks
of sparse layers, and to add up gradients. Nothing is dropped.
"""

from __future__ import annotations

import math

from ..memory import MemoryConfig
from ..memory.dispatch import INDEX_BYTES, SIZES_BYTES
from ..memory.selectors.avgk import AvgK


def sent_bytes(
    config: MemoryConfig,
    shards: int,
    number_bytes: int,
    rows_sent: float,
    rows_received: float,
    pairs_sent: float,
    pairs_received: float,
    recomputed: bool = False,
) -> float:
    """Bytes that a rank sends to others for one sparse layer, forward and backward: exactly what
    the memory counts as ``sent``.

    Args:
        shards: ranks over which the blocks are shared out.
        number_bytes: of a number in the model's precision.
        rows_sent: hidden states sent to other ranks, a token's once to each of its ranks.
        rows_received: those that came from other ranks.
        pairs_sent: (token, block) pairs whose block is on another rank.
        pairs_received: pairs of other ranks' tokens whose block is here.
        recomputed: whether activation checkpointing runs the forward pass twice.
    """
    rows = (rows_sent + rows_received) * config.embed_dim  # what is received is sent back
    weighed = config.gate_name != "none"
    forward = (rows + weighed * pairs_sent) * number_bytes
    backward = (rows + weighed * pairs_received) * number_bytes
    # Row and block of each pair, after the sizes that each rank is to expect.
    indices = 2 * INDEX_BYTES * pairs_sent + SIZES_BYTES * (shards - 1)
    return (forward + indices) * (1 + recomputed) + backward


def expected_sent_bytes(
    config: MemoryConfig, shards: int, number_bytes: int, tokens: int, recomputed: bool = False
) -> float:
    """:func:`sent_bytes` where each rank has so many tokens, routing is even and drops nothing."""
    rows = tokens * (shards - 1) * visit_probability(config, shards)
    pairs = tokens * config.active_blocks * (shards - 1) / shards
    return sent_bytes(config, shards, number_bytes, rows, rows, pairs, pairs, recomputed)


def mean_keys_bytes(
    config: MemoryConfig, shards: int, number_bytes: int, recomputed: bool = False
) -> int:
    """Bytes that a rank sends in a ring for all ranks to have the mean keys and biases of a layer,
    and their gradients to return; the memory does not count them."""
    if not issubclass(config.selector_class, AvgK):
        return 0
    # Gradients return only where they flow through scores, which nothing but a gate reads.
    passes = 1 + recomputed + (config.gate_name != "none")
    bias = config.bias and not config.selector_options.exclude_bias
    part = config.num_blocks // shards * (config.embed_dim + bias)
    return (shards - 1) * part * number_bytes * passes


def all_reduce_bytes(size: int, ranks: int) -> float:
    """Bytes that a rank sends to add up tensors of ``size`` bytes over ranks in a ring."""
    return 2 * (ranks - 1) / ranks * size


def visit_probability(config: MemoryConfig, shards: int) -> float:
    """How likely a token uses any block of a given rank when all sets of blocks are alike: one
    minus the probability to draw all from other ranks (hypergeometric)."""
    blocks, active = config.num_blocks, config.active_blocks
    return 1 - math.comb(blocks - blocks // shards, active) / math.comb(blocks, active)
