"""Measures how much longer reading a checkpoint takes with checksums, per gigabyte.

python examples/benchmark/checksums.py --repeats 5
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import torch
from timing import Work, compare

from fairseq_sffn.checkpoints.reading import read_file

TENSORS, EACH = 16, 2**24
"""Number of fp32 tensors and numbers in each: a gigabyte together."""


def main() -> None:
    """Measure both ways to read and print the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save({str(i): torch.randn(EACH) for i in range(TENSORS)}, path)
        read = functools.partial(read_file, path)
        without, verified = (Work(functools.partial(read, verify=v)) for v in (False, True))
        times = compare(without, {"verified": verified}, args.repeats)["verified"]
        added = times["seconds"]["median"] - times["base_seconds"]["median"]
        gigabytes = path.stat().st_size / 1e9
    print(
        f"reading takes {times['base_seconds']['median'] / gigabytes:.2f} s a gigabyte, checksums "
        f"add {added / gigabytes:.2f} s (medians of {args.repeats}; file cached in memory)"
    )


if __name__ == "__main__":
    main()
