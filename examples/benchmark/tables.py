"""Measures how the size of the tables makes large blocks slower than a dense FFN.

Matrix products of a layer with sorted tokens are compared with the single product of the dense FFN.
The variants are: a product for each block, all with the same matrix; a product for each block with
its own matrix, which is read from memory instead of cache; and, for the gradient of the table,
results in newly allocated memory, as in each step of a training.
"""

from __future__ import annotations

from typing import Any

import torch
from timing import Work, arguments, compare, run_part


def measure(
    repeats: int, tokens: int = 2048, width: int = 256, cells: int = 1024, blocks: int = 16
) -> list[dict[str, Any]]:
    """Return a JSON row for each product and way to compute it, with the ``ratio`` to the dense
    one."""
    x_ND, grad_NK = torch.randn(tokens, width), torch.randn(tokens, cells)
    one_KD, own_BKD = torch.randn(cells, width), torch.randn(blocks, cells, width)
    each = tokens // blocks
    xs, grads = x_ND.split(each), grad_NK.split(each)
    hidden_NK, grad_x_ND = torch.empty(tokens, cells), torch.empty(tokens, width)
    grad_KD, grad_BKD = torch.empty_like(one_KD), torch.empty_like(own_BKD)
    same = [one_KD] * blocks

    def forward(left: Any, matrices: Any, outs: Any) -> Work:
        def run() -> None:
            for rows, matrix, out in zip(left, matrices, outs, strict=True):
                torch.mm(rows, matrix.t(), out=out)

        return Work(run)

    def grad_x(left: Any, matrices: Any, outs: Any) -> Work:
        def run() -> None:
            for rows, matrix, out in zip(left, matrices, outs, strict=True):
                torch.mm(rows, matrix, out=out)

        return Work(run)

    def grad_table(left: Any, right: Any, outs: Any) -> Work:
        def run() -> None:
            made = torch.empty_like(own_BKD) if outs is None else outs
            for rows, others, out in zip(left, right, made, strict=True):
                torch.mm(rows.t(), others, out=out)

        return Work(run)

    ways = {
        "x . keys": (
            forward([x_ND], [one_KD], [hidden_NK]),
            {
                "same matrix": forward(xs, same, hidden_NK.split(each)),
                "own matrices": forward(xs, own_BKD, hidden_NK.split(each)),
            },
        ),
        "gradient of x": (
            grad_x([grad_NK], [one_KD], [grad_x_ND]),
            {
                "same matrix": grad_x(grads, same, grad_x_ND.split(each)),
                "own matrices": grad_x(grads, own_BKD, grad_x_ND.split(each)),
            },
        ),
        "gradient of keys": (
            grad_table([grad_NK], [x_ND], [grad_KD]),
            {
                "same matrix": grad_table(grads, xs, [grad_KD] * blocks),
                "own matrices": grad_table(grads, xs, grad_BKD),
                "own matrices, fresh memory": grad_table(grads, xs, None),
            },
        ),
    }
    return [
        {"product": product, "way": way, **figures}
        for product, (dense, others) in ways.items()
        for way, figures in compare(dense, others, repeats, f"tables, {product}").items()
    ]


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    run_part("tables", args, lambda: measure(args.repeats))


if __name__ == "__main__":
    main()
