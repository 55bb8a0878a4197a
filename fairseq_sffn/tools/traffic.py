"""Bytes that a rank sends in an update on one micro-batch.

A rank sends tokens to the blocks of sparse layers and back, and gradients. No assignment is
dropped.
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
    """Return the bytes that a rank sends to others for one sparse layer, forward and backward.

    They equal the bytes that the memory counts as ``sent``.

    Args:
        config: the memory.
        shards: ranks over which the blocks are sharded.
        number_bytes: bytes of a number in the model's precision.
        rows_sent: hidden states sent to other ranks. A token is sent to a rank once.
        rows_received: hidden states received from other ranks.
        assignments_sent: assignments (token, block) whose block is on another rank.
        assignments_received: assignments of other ranks' tokens to blocks of this rank.
        recomputed: whether activation checkpointing runs the forward pass twice.
    """
    rows = (rows_sent + rows_received) * config.embed_dim  # outputs return for the received rows
    weighed = config.gate_name != "none"
    forward = (rows + weighed * assignments_sent) * number_bytes
    backward = (rows + weighed * assignments_received) * number_bytes
    # Row and block of each assignment, and before them the sizes that each rank has to expect.
    indices = 2 * INDEX_BYTES * assignments_sent + SIZES_BYTES * (shards - 1)
    return (forward + indices) * (1 + recomputed) + backward


def expected_sent_bytes(
    config: MemoryConfig, shards: int, number_bytes: int, tokens: int, recomputed: bool = False
) -> float:
    """Return the expected :func:`sent_bytes` with even routing.

    Args:
        config, shards, number_bytes, recomputed: see :func:`sent_bytes`.
        tokens: tokens of each rank.
    """
    rows = tokens * (shards - 1) * visit_probability(config, shards)
    assignments = tokens * config.active_blocks * (shards - 1) / shards
    return sent_bytes(
        config, shards, number_bytes, rows, rows, assignments, assignments, recomputed
    )


def mean_keys_bytes(
    config: MemoryConfig, shards: int, number_bytes: int, recomputed: bool = False
) -> int:
    """Return the bytes that a rank sends to gather the mean keys and biases of a layer.

    The bytes are those of a ring, and include the gradients. The memory does not count them.

    Args:
        config, shards, number_bytes, recomputed: see :func:`sent_bytes`.
    """
    if not issubclass(config.selector_class, AvgK):
        return 0
    # Mean keys have gradients only with a gate, which reads the scores, and no moving average.
    options = config.selector_options
    passes = 1 + recomputed + (config.gate_name != "none" and not options.key_ema)
    bias = config.bias and not options.exclude_bias
    part = config.num_blocks // shards * (config.embed_dim + bias)
    return (shards - 1) * part * number_bytes * passes


def all_reduce_bytes(size: int, ranks: int) -> float:
    """Return the bytes that a rank sends in a ring all-reduce.

    Args:
        size: bytes of the tensors.
        ranks: number of ranks.
    """
    return 2 * (ranks - 1) / ranks * size


def all_to_all_share(ranks: int, ranks_per_node: int) -> float:
    """Return the share of what a rank sends in an all-to-all that leaves its node.

    Args:
        ranks: consecutive ranks that exchange, each as much with each.
        ranks_per_node: ranks of a node.
    """
    return max(ranks - ranks_per_node, 0) / max(ranks - 1, 1)


def ring_share(ranks: int, ranks_per_node: int) -> float:
    """Return the share of a ring's bytes that leave a node, over all of its ranks.

    Only the last rank of each node sends to another node.

    Args:
        ranks: ranks of the ring, of which those of a node are neighbours.
        ranks_per_node: ranks of the ring in a node.
    """
    return 1 / ranks_per_node if ranks > ranks_per_node else 0.0


def visit_probability(config: MemoryConfig, shards: int) -> float:
    """Return the probability that a token uses at least one block of a given rank.

    All sets of blocks are equally likely. The result is 1 minus the hypergeometric probability that
    all of the token's blocks are on other ranks.

    Args:
        config: the memory.
        shards: ranks over which the blocks are sharded.
    """
    blocks, active = config.num_blocks, config.active_blocks
    return 1 - math.comb(blocks - blocks // shards, active) / math.comb(blocks, active)
