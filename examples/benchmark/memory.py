"""Measures the memory that a layer keeps for the backward pass and its peak, against a dense FFN.

`saved`: bytes of the distinct storages that autograd saves, without parameters, buffers and input.
`live`: bytes that the forward pass allocated and still holds, without its output. They include what
a custom function keeps on its context. `peak`: the largest number of bytes that forward and
backward had allocated at once, with gradients. The gradients of the tables are 16 times the dense
ones. `temporary`: the peak without the gradients of parameters. PyTorch reports the allocations to
its profiler, so other memory of the process does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from layer import (
    VOCABULARY,
    Row,
    block_sizes,
    build_memory,
    default_rows,
    memory_config,
    training_work,
)
from timing import Work, arguments, dense_ffn, forward_backward, hidden_states, progress, run_part
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class Saved:
    """A tensor saved for the backward pass. It lives as long as the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(run: Callable[[], object], excluded: list[Tensor]) -> int:
    """Count the bytes of the distinct storages saved for the backward pass of ``run``'s result."""
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        alive.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = run()
    # Graphs that do not lead to the result are gone, and so is what they saved.
    storages = [saved.tensor.untyped_storage() for saved in alive]
    del result
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in known)


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes still held after ``run``, and the largest number held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    kineto = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return held, peak


def figures(module: nn.Module, work: Work, forward: Callable[[], Any], x: Tensor) -> dict[str, int]:
    """Return the four numbers of bytes by name."""
    work.prepare()
    work.run()  # allocate what stays from then on
    work.prepare()
    saved = saved_bytes(forward, [*module.parameters(), *module.buffers(), x])
    live, _ = allocations(forward)
    _, peak = allocations(work.run)
    gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    return {
        "saved": saved,
        "live": live - x.nbytes,
        "peak": peak,
        "temporary": peak - gradients,
    }


def measure(
    tokens: int, width: int, rows: list[Row] | None = None, ffn: int | None = None
) -> list[dict[str, Any]]:
    """Return a JSON row for each layer, the dense FFN first."""
    ffn = ffn or 4 * width
    if rows is None:
        rows = [Row("avgk", g) for g in block_sizes(ffn)]
        rows += [row for row in default_rows(ffn) if row.selector != "avgk"]
    x = hidden_states(tokens, width)
    token_ids = torch.randint(VOCABULARY, (tokens,))
    dense = dense_ffn(width, ffn)
    base = figures(dense, forward_backward(dense, x), lambda: dense(x), x)
    result: list[dict[str, Any]] = [{"selector": "dense", "block_size": None, **base}]
    for i, row in enumerate(rows):
        memory = build_memory(row, memory_config(row, width, ffn))
        weight = memory.config.selector_class.default_balance_weight
        work = training_work(memory, x, token_ids)

        def forward(memory: Any = memory, losses: bool = weight > 0) -> Any:
            out = memory(x, token_ids, losses=losses)
            # Without the statistics, which a training step drops at once.
            return (out.output, out.balance_loss) if losses else out.output

        its = figures(memory, work, forward, x)
        ratios = {f"{name}_ratio": its[name] / base[name] for name in its}
        result.append({**row._asdict(), **its, **ratios})
        progress(f"memory {i + 1}/{len(rows)}", last=i + 1 == len(rows))
    return result


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args(argv)
    run_part("memory", args, lambda: measure(args.tokens, args.width))


if __name__ == "__main__":
    main()
