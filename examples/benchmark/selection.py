"""Measures selection and the optimizer's step alone, in units of a dense FFN's forward + backward.

Selection is the selector's forward pass in training. The optimizer's step updates all parameters of
a layer, with the gradients of a real backward pass. The unit grows with the number of tokens, the
step does not.
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq import optim
from layer import (
    VOCABULARY,
    Row,
    block_sizes,
    build_memory,
    default_rows,
    memory_config,
    training_work,
)
from timing import Work, arguments, compare, dense_ffn, forward_backward, hidden_states, run_part
from torch import Tensor, nn
from train_step import training_config

from fairseq_sffn.memory import SelectorInput, SparseMemory

OPTIMIZERS = ("adam", "sffn_adam")


def selection_work(memory: SparseMemory, x: Tensor, token_ids: Tensor) -> Work:
    ids_NT = token_ids.unsqueeze(1) if memory.config.context_tokens else None
    inputs = SelectorInput(x, memory.keys, memory.key_bias, ids_NT)
    return Work(lambda: memory.selector(inputs))


def optimizer_work(name: str, module: nn.Module, backward: Work) -> Work:
    """Prepare a step of fairseq's optimizer ``name`` with its defaults, from the gradients of a
    batch."""
    config = training_config("dense", name).optimizer
    optimizer = optim.build_optimizer(config, list(module.parameters()))
    backward.prepare()
    backward.run()
    gradients = {p: p.grad for p in module.parameters()}

    def prepare() -> None:  # another work may have dropped the gradients
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    return Work(optimizer.step, prepare)


def measure(
    tokens: int, width: int, repeats: int, rows: list[Row] | None = None, ffn: int | None = None
) -> list[dict[str, Any]]:
    """Return JSON rows; ``what`` is selection or the name of an optimizer."""
    ffn = ffn or 4 * width
    if rows is None:
        rows = [Row("avgk", g) for g in block_sizes(ffn)]
        rows += [row for row in default_rows(ffn) if row.selector != "avgk"]
    x = hidden_states(tokens, width)
    token_ids = torch.randint(VOCABULARY, (tokens,))
    dense = dense_ffn(width, ffn)
    base = forward_backward(dense, x)
    labels: list[dict[str, Any]] = []
    works: dict[str, Work] = {}

    def add(work: Work, **label: Any) -> None:
        works[str(len(labels))] = work
        labels.append(label)

    for row in rows:
        memory = build_memory(row, memory_config(row, width, ffn))
        work = selection_work(memory, x, token_ids)
        add(work, what="selection", selector=row.selector, block_size=row.block_size)
    for name in OPTIMIZERS:
        # These layers are separate because the base changes its gradients.
        ffn_layer = dense_ffn(width, ffn)
        add(
            optimizer_work(name, ffn_layer, forward_backward(ffn_layer, x)),
            what=name,
            selector="dense",
            block_size=None,
        )
        row = Row("avgk", min(64, ffn))
        memory = build_memory(row, memory_config(row, width, ffn))
        add(
            optimizer_work(name, memory, training_work(memory, x, token_ids)),
            what=name,
            selector=row.selector,
            block_size=row.block_size,
        )
    timed = compare(base, works, repeats, "selection and optimizers")
    return [{**label, **figures} for label, figures in zip(labels, timed.values(), strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args(argv)
    run_part("selection", args, lambda: measure(args.tokens, args.width, args.repeats))


if __name__ == "__main__":
    main()
