"""Memory that a layer keeps for the backward pass and needs at its peak, against a dense FFN.

`saved`: bytes of the distinct storages that autograd saves, parameters, buffers and the input left
out. `live`: what the forward pass allocated and still holds, its output left out; it also sees what
a custom function keeps on its context. `peak`: the most that forward and backward together had
allocated at once, gradients included (those of all tables, 16 times the dense ones).
`temporary`: the same without the gradients of parameters. Allocations are PyTorch's own report to
its profiler, so nothing depends on the process's other memory.
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
    """A tensor saved for the backward pass; lives as long as the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(run: Callable[[], object], excluded: list[Tensor]) -> int:
    """Bytes of the distinct storages that are saved for the backward pass of ``run``'s result."""
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        alive.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = run()
    # Graphs that do not lead to the result are gone, and what they saved with them.
    storages = [saved.tensor.untyped_storage() for saved in alive]
    del result
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in known)


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes allocated and still held after ``run``, and the most at once."""
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
    """Bytes, by name as above."""
    work.prepare()
    work.run()  # what is allocated once and for all
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
    """A JSON row each, the dense FFN's first."""
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
            # Without what a training step drops at once.
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
