"""The losses of routing: load balance, and the size of the scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .scores import Scores, Split, mean_over_tokens

Total = Callable[[Tensor], Tensor]


def assignment_counts(blocks_NA: Tensor, num_blocks: int, counted: Tensor | None) -> Tensor:
    """Count the assignments of each block.

    Args:
        blocks_NA: selected blocks.
        num_blocks: B.
        counted: bool, broadcasts to (N, A); ``None`` counts all.

    Returns:
        (B,) int64.
    """
    if counted is None:
        ones_NA = blocks_NA.new_ones(blocks_NA.shape)
    else:
        ones_NA = counted.to(blocks_NA.dtype).expand_as(blocks_NA)
    counts_B = blocks_NA.new_zeros(num_blocks)
    return counts_B.scatter_add_(0, blocks_NA.flatten(), ones_NA.flatten())


def balance_loss(
    scores: Scores,
    counts_B: Tensor,
    valid_N: Tensor | None,
    total: Total | None = None,
    function: str = "softmax",
) -> Tensor:
    """Compute B * sum_i (mean score share of block i) * (share of the assignments to block i).

    Fedus et al. 2021 (arXiv 2101.03961), eq. 4. It is 1.0 at perfect balance and B if one block has
    all assignments. It covers all tokens of a micro-batch, for each layer. With counts that include
    earlier micro-batches, it is the global-batch loss (Qiu et al. 2025, arXiv 2501.11873).

    Tutel and the fairseq MoE branch compute the same. fairscale's loss is this divided by B^2. The
    Mixtral loss of transformers, for one layer, is this times the number of active blocks. No
    factor converts other losses: transformers' Mixtral pools the tokens of several layers;
    transformers' Switch, st-moe-pytorch and mixture-of-experts average the losses of sequences,
    and Switch also pools the layers of a sequence.

    Args:
        scores: of all blocks.
        counts_B: assignments of each block.
        valid_N: bool, ``False`` at padding; ``None``: no padding.
        total: sums a vector over the ranks that share tokens; gradients reach all of them.
        function: the score function; see :meth:`.scores.Scores.shares`.

    Returns:
        () loss.
    """
    probs_B = scores.mean_shares(valid_N, function).squeeze(0)
    if total is not None:
        # One collective for all, in a dtype that keeps counts exact.
        tokens = _tokens(scores, valid_N).double()
        sums = total(torch.cat([probs_B.double() * tokens, tokens, counts_B.double()]))
        num_blocks = len(counts_B)
        probs_B = (sums[:num_blocks] / sums[num_blocks].clamp(min=1)).to(probs_B.dtype)
        counts_B = sums[num_blocks + 1 :].detach()
    return _imbalance(probs_B, counts_B)


def sequence_balance_loss(
    scores: Scores,
    blocks_NA: Tensor,
    counted: Tensor | None,
    valid_N: Tensor | None,
    split: Split,
    total: Total | None = None,
    function: str = "softmax",
) -> Tensor:
    """Compute the loss of :func:`balance_loss` for each sequence, and average the sequences.

    DeepSeek-AI 2024 (arXiv 2412.19437), eqs. 17 to 20. Sequences of padding alone do not count.

    Args:
        scores, valid_N, total, function: see :func:`balance_loss`.
        blocks_NA: selected blocks.
        counted: bool, broadcasts to (N, A); ``None`` counts all.
        split: gives the tokens by sequence.

    Returns:
        () loss.
    """
    num_blocks, blocks_STA = scores.num_blocks, split(blocks_NA)
    # The blocks of each sequence get numbers of their own.
    starts_S = torch.arange(len(blocks_STA), device=blocks_NA.device) * num_blocks
    blocks_NA = (blocks_STA + starts_S[:, None, None]).flatten(0, 1)
    if counted is not None:
        counted = split(counted).flatten(0, 1)
    counts_SB = assignment_counts(blocks_NA, len(starts_S) * num_blocks, counted)
    counts_SB = counts_SB.unflatten(0, (-1, num_blocks))
    losses_S = _imbalance(scores.mean_shares(valid_N, function, split), counts_SB)
    counts_S = counts_SB.any(dim=1)
    sums = torch.stack([(losses_S * counts_S).sum(), counts_S.sum().to(losses_S.dtype)])
    if total is not None:
        sums = total(sums)
    return sums[0] / sums[1].detach().clamp(min=1)


def _imbalance(probs_B: Tensor, counts_B: Tensor) -> Tensor:
    """Return B * sum_i probs_i * (share of the counts of i), over the last dimension."""
    counts_B = counts_B.to(probs_B.dtype)
    shares_B = counts_B / counts_B.sum(dim=-1, keepdim=True).clamp(min=1)
    return counts_B.shape[-1] * (probs_B * shares_B).sum(dim=-1)


def z_loss(scores: Scores, valid_N: Tensor | None, total: Total | None = None) -> Tensor:
    """Compute the mean squared log-partition of the scores, which keeps them small.

    Zoph et al. 2022 (arXiv 2202.08906), eq. 5.

    Args:
        scores, valid_N, total: see :func:`balance_loss`.

    Returns:
        () loss.
    """
    mean_1 = mean_over_tokens(scores.log_partition().square(), valid_N).mean().unsqueeze(0)
    return _mean_over_ranks(mean_1, scores, valid_N, total).squeeze(0)


def entropy_loss(scores: Scores, valid_N: Tensor | None, total: Total | None = None) -> Tensor:
    """Compute minus the entropy of the mean softmax over the tokens, in nats.

    Csordas et al. 2023 (arXiv 2310.10837), section 5. It is -log B if all blocks are equally likely
    on average, and 0 if one block is certain.

    Args:
        scores, valid_N, total: see :func:`balance_loss`.

    Returns:
        () loss.
    """
    probs_B = _mean_over_ranks(scores.mean_shares(valid_N).squeeze(0), scores, valid_N, total)
    # Without valid tokens the probabilities are 0, where the logarithm has no gradient.
    return (probs_B * probs_B.clamp(min=torch.finfo(probs_B.dtype).tiny).log()).sum()


def _mean_over_ranks(
    mean_X: Tensor, scores: Scores, valid_N: Tensor | None, total: Total | None
) -> Tensor:
    """Return the mean over the tokens of all ranks from the mean over this rank's tokens."""
    if total is None:
        return mean_X
    tokens = _tokens(scores, valid_N).double()
    sums = total(torch.cat([mean_X.double() * tokens, tokens]))
    return (sums[:-1] / sums[-1].clamp(min=1)).to(mean_X.dtype)


def _tokens(scores: Scores, valid_N: Tensor | None) -> Tensor:
    """Return the number of tokens that count: (1,)."""
    if valid_N is None:
        # Not `torch.tensor`, whose copy from the host waits for the device.
        return torch.full((1,), scores.num_tokens, device=scores.device)
    return valid_N.sum().unsqueeze(0)
