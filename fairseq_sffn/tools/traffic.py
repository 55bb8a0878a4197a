"""Bytes that a rank sends in an update on one micro-batch: tokens to the blocks of sparse layers
and back, and gradients. No assignment is dropped.
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
    assignments_sent: float,
    assignments_received: float,
    recomputed: bool = False,
) -> float:
    """Return the bytes that a rank sends to others for one sparse layer, forward and backward:
    exactly what the memory counts as ``sent``.

    Args:
        config: the memory.
        shards: ranks over which the blocks are sharded.
        number_bytes: bytes of a number in the model's precision.
        rows_sent: hidden states sent to other ranks; a token's goes to each of its ranks once.
        rows_received: hidden states that came from other ranks.
        assignments_sent: assignments (token, block) whose block is on another rank.
        assignments_received: assignments of other ranks' tokens to blocks of this rank.
        recomputed: whether activation checkpointing runs the forward pass twice.
    """
    rows = (rows_sent + rows_received) * config.embed_dim  # what is received is sent back
    weighed = config.gate_name != "none"
    forward = (rows + weighed * assignments_sent) * number_bytes
    backward = (rows + weighed * assignments_received) * number_bytes
    # Row and block of each pair, after the sizes that each rank is to expect.
    indices = 2 * INDEX_BYTES * assignments_sent + SIZES_BYTES * (shards - 1)
    return (forward + indices) * (1 + recomputed) + backward


def expected_sent_bytes(
    config: MemoryConfig, shards: int, number_bytes: int, tokens: int, recomputed: bool = False
) -> float:
    """Return the expected :func:`sent_bytes` where each rank has ``tokens`` tokens and routing is
    even."""
    rows = tokens * (shards - 1) * visit_probability(config, shards)
    assignments = tokens * config.active_blocks * (shards - 1) / shards
    return sent_bytes(
        config, shards, number_bytes, rows, rows, assignments, assignments, recomputed
    )


def mean_keys_bytes(
    config: MemoryConfig, shards: int, number_bytes: int, recomputed: bool = False
) -> int:
    """Return the bytes that a rank sends in a ring so that all ranks have the mean keys and biases
    of a layer, and for their gradients. The memory does not count them."""
    if not issubclass(config.selector_class, AvgK):
        return 0
    # Only a gate reads scores, so that mean keys have gradients only with one.
    passes = 1 + recomputed + (config.gate_name != "none")
    bias = config.bias and not config.selector_options.exclude_bias
    part = config.num_blocks // shards * (config.embed_dim + bias)
    return (shards - 1) * part * number_bytes * passes


def all_reduce_bytes(size: int, ranks: int) -> float:
    """Return the bytes that a rank sends in a ring to sum tensors of ``size`` bytes over ranks."""
    return 2 * (ranks - 1) / ranks * size


def visit_probability(config: MemoryConfig, shards: int) -> float:
    """Return the probability that a token uses any block of a given rank if all sets of blocks are
    equally likely: one minus that of drawing all blocks from other ranks (hypergeometric)."""
    blocks, active = config.num_blocks, config.active_blocks
    return 1 - math.comb(blocks - blocks // shards, active) / math.comb(blocks, active)
