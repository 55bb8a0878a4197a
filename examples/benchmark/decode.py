"""Measures decoding: evaluation with a few tokens at a time, against a dense FFN of as many cells.

Each call gets other hidden states and token ids than the call before. Otherwise the blocks of a
call would be in the cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from layer import VOCABULARY, Row, build_memory, memory_config
from timing import CPU, Place, Work, arguments, compare, dense_ffn, place_of, run_part, seconds

COUNTS = (1, 2, 4, 8)
WIDTHS = (256, 1024)
MODES = {"inference_mode": torch.inference_mode}
INPUTS = 64


def choose_rows(ffn: int) -> list[Row]:
    avgk = [Row("avgk", g) for g in (ffn, 256, 64, 16) if g <= ffn]
    return [*avgk, Row("rand_hash", min(64, ffn)), Row("vanilla_m", 1)]


def measure(
    repeats: int,
    counts: tuple[int, ...] = COUNTS,
    widths: tuple[int, ...] = WIDTHS,
    at_least: float = 0.01,
    place: Place = CPU,
) -> list[dict[str, Any]]:
    """Return JSON rows. Calls are timed in groups that take about ``at_least`` seconds with the
    dense FFN."""
    rows: list[dict[str, Any]] = []
    for width in widths:
        ffn = 4 * width
        dense = dense_ffn(width, ffn, place).eval()
        chosen = choose_rows(ffn)
        configs = [memory_config(row, width, ffn) for row in chosen]
        memories = [
            build_memory(row, config, place).eval()
            for row, config in zip(chosen, configs, strict=True)
        ]
        for count, (mode, context) in itertools.product(counts, MODES.items()):
            xs = torch.randn(INPUTS, count, width, **place.tensors).unbind()
            ids = torch.randint(VOCABULARY, (INPUTS, count), device=place.device).unbind()

            def work(call: Any, calls: int, inputs: Any, context: Any = context) -> Work:
                cycle = itertools.cycle(inputs)

                def run() -> None:
                    with context():
                        for _ in range(calls):
                            call(*next(cycle))

                return Work(run)

            alone = [(x,) for x in xs]
            once = work(dense, INPUTS, alone)
            seconds(once, device=place.device)
            calls = max(1, round(at_least * INPUTS / seconds(once, device=place.device)))
            works = {
                str(i): work(
                    lambda x, i, memory=memory: memory(x, i, losses=False),
                    calls,
                    list(zip(xs, ids, strict=True)),
                )
                for i, memory in enumerate(memories)
            }
            label = f"decoding {count} x {width}, {mode}"
            alone_work = work(dense, calls, alone)
            timed = compare(alone_work, works, repeats, label, device=place.device)
            for row, figures in zip(chosen, timed.values(), strict=True):
                tokens = calls * count
                rows.append(
                    {
                        **place.describe(),
                        **{"width": width, "tokens": count, "mode": mode},
                        **{"selector": row.selector, "block_size": row.block_size},
                        "ratio": figures["ratio"],
                        "tokens_per_second": tokens / figures["seconds"]["median"],
                        "dense_tokens_per_second": tokens / figures["base_seconds"]["median"],
                    }
                )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, places=True).parse_args(argv)
    place = place_of(args)
    run_part("decode", args, lambda: measure(args.repeats, place=place))


if __name__ == "__main__":
    main()
