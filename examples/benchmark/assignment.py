"""Measures how long BASE's assignment of tokens to blocks takes on the host.

python examples/benchmark/assignment.py --repeats 5
"""

from __future__ import annotations

import argparse
import functools

import torch
from timing import Work, seconds, spread

from fairseq_sffn.memory.assignment import balanced_assignment

TOKENS, BLOCKS = 8192, (16, 64)
SKEWS = (0.0, 2.0)
"""Standard deviations of the part of a block's scores that all tokens share. The part of each token
has standard deviation 1."""


def main() -> None:
    """Measure the assignment and print the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    for blocks in BLOCKS:
        for skew in SKEWS:
            scores_NB = torch.randn(TOKENS, blocks) + skew * torch.randn(blocks)
            work = Work(functools.partial(balanced_assignment, scores_NB))
            times = spread(seconds(work) for _ in range(args.repeats))
            print(
                f"{TOKENS} tokens, {blocks} blocks, skew {skew:g}: "
                f"{1000 * times['median']:.0f} ms (median of {args.repeats})"
            )


if __name__ == "__main__":
    main()
