"""What the loops of ``oracle_methods.py`` are made of: inputs, products, cells and best blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryConfig, Selection, SparseMemory


class Tables(NamedTuple):
    """The rows of a module's tables. Autograd adds up the gradients of rows that a table was split
    into in a tenth of the time that it takes for rows that were read from it one by one."""

    keys: tuple[Tensor, ...] | None
    key_bias: tuple[Tensor, ...] | None
    up: tuple[Tensor, ...] | None
    up_bias: tuple[Tensor, ...] | None
    values: tuple[Tensor, ...]


def split(module: nn.Module) -> Tables:
    """Split the tables of a memory, or those of its shared blocks."""
    tables = (getattr(module, name, None) for name in Tables._fields)
    return Tables(*(None if table is None else table.unbind() for table in tables))


class Inputs(NamedTuple):
    """The inputs of a selection.

    Attributes:
        tables: the tables of ``memory``.
        made: the memory's own selection, for a method whose best choice is not unique.
        rng: state of the random generator before the selection, for a method that draws.
    """

    memory: SparseMemory
    tables: Tables
    x_ND: tuple[Tensor, ...]
    ids_NT: Tensor | None
    valid: list[int]
    made: Selection
    rng: Tensor


class Choice(NamedTuple):
    """A selection.

    Attributes:
        hidden: ``hidden(n, a, cell)`` is the factor of the value of a cell of the a-th block of
            token n.
        scores: ``scores[n][h][i]`` is the score of block i by head h.
        kept: whether each assignment is kept; all by default.
    """

    blocks: list[list[int]]
    hidden: Callable[[int, int, int], Tensor]
    scores: list[list[list[Tensor]]] | None = None
    kept: list[list[bool]] | None = None
    coefficients: list[list[Tensor]] | None = None


def best(scores: list[Tensor], active: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:active]


def best_by_cells(
    inputs: Inputs,
    pre: Callable[[int, int], Tensor],
    aggregate: Callable[[list[Tensor]], Tensor],
) -> Choice:
    config = inputs.memory.config.routed
    scores = [
        [
            [
                aggregate([pre(n, cell) for cell in cells(config, i)])
                for i in range(config.routed.num_blocks)
            ]
        ]
        for n in range(len(inputs.x_ND))
    ]
    blocks = [best(row[0], config.routed.active_blocks) for row in scores]
    return Choice(blocks, hidden_of(inputs, pre), scores)


def best_products(inputs: Inputs) -> tuple[list[list[int]], list[list[list[Tensor]]]]:
    """Select blocks and scores by product keys, from all products."""
    selector, active = inputs.memory.selector, inputs.memory.config.routed.active_blocks
    num_heads, _, half = selector.left.shape
    weight_QD, bias_Q = selector.query.weight.unbind(), selector.query.bias.unbind()
    left_HB, right_HB = (
        [keys.unbind() for keys in table.unbind()] for table in (selector.left, selector.right)
    )
    blocks, scores = [], []
    for x_D in inputs.x_ND:
        features = [dot(row_D, x_D) + b for row_D, b in zip(weight_QD, bias_Q, strict=True)]
        scores.append([])
        for h in range(num_heads):
            query = _norm(selector.norm, features[2 * half * h : 2 * half * (h + 1)])
            first, second = torch.stack(query[:half]), torch.stack(query[half:])
            lefts = [dot(first, key) for key in left_HB[h]]
            rights = [dot(second, key) for key in right_HB[h]]
            scores[-1].append([left + right for left in lefts for right in rights])
        of_heads = [best(head, active // num_heads) for head in scores[-1]]
        blocks.append([block for rank in zip(*of_heads, strict=True) for block in rank])
    return blocks, scores


def _norm(norm: nn.Module, features: list[Tensor]) -> list[Tensor]:
    if isinstance(norm, nn.Identity):
        return features
    mean = add_up(features) / len(features)
    centred = [f - mean for f in features]
    deviation = torch.sqrt(add_up([f * f for f in centred]) / len(features) + norm.eps)
    return [
        f / deviation * weight + bias
        for f, weight, bias in zip(centred, norm.weight.unbind(), norm.bias.unbind(), strict=True)
    ]


def dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum()


def add_up(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(values).sum()


def aggregate(inputs: Inputs) -> Callable[[list[Tensor]], Tensor]:
    return {
        "avg": lambda values: add_up(values) / len(values),
        "avg_abs": lambda values: add_up([v if v > 0 else -v for v in values]) / len(values),
        "max": lambda values: max(values, key=float),
        "min": lambda values: min(values, key=float),
        "l2": lambda values: torch.sqrt(add_up([v * v for v in values])),
    }[inputs.memory.config.routed.selector_options.aggregate]


def cells(config: MemoryConfig, block: int) -> range:
    return range(block * config.block_size, (block + 1) * config.block_size)


def pre_activations(inputs: Inputs) -> Callable[[int, int], Tensor]:
    tables, x_ND = inputs.tables, inputs.x_ND

    @cache
    def pre(n: int, cell: int) -> Tensor:
        return _product(x_ND[n], tables.keys, tables.key_bias, cell)

    return pre


def key_factor(inputs: Inputs) -> Callable[[int], Tensor | float]:
    """Return the function from a cell to the factor of its pre-activation in a mean key's score."""
    config, tables = inputs.memory.config, inputs.tables
    options = config.selector_options

    @cache
    def factor(cell: int) -> Tensor | float:
        result: Tensor | float = 1.0
        if options.normalize_keys:
            result = result / torch.sqrt(dot(tables.keys[cell], tables.keys[cell]))
        if options.value_norm:
            value_D = config.value_lr_scale * tables.values[cell]
            result = result * torch.sqrt(dot(value_D, value_D))
        return result

    return factor


def hidden_of(
    inputs: Inputs, pre: Callable[[int, int], Tensor]
) -> Callable[[int, int, int], Tensor]:
    config, tables, x_ND = inputs.memory.config, inputs.tables, inputs.x_ND

    def hidden(n: int, a: int, cell: int) -> Tensor:
        result = apply_activation(config, pre(n, cell))
        if config.glu:
            result = result * _product(x_ND[n], tables.up, tables.up_bias, cell)
        return result

    return hidden


def hidden_unit(config: MemoryConfig, tables: Tables, x_D: Tensor, cell: int) -> Tensor:
    """Return the factor of the value of a cell, from ``keys`` and ``up`` and their biases."""
    result = apply_activation(config, _product(x_D, tables.keys, tables.key_bias, cell))
    return result * _product(x_D, tables.up, tables.up_bias, cell) if config.glu else result


def _product(
    x_D: Tensor, table_CD: Sequence[Tensor], bias_C: Sequence[Tensor] | None, cell: int
) -> Tensor:
    product = dot(x_D, table_CD[cell])
    return product if bias_C is None else product + bias_C[cell]


def apply_activation(config: MemoryConfig, z: Tensor) -> Tensor:
    name = config.glu or config.activation
    if name == "relu":
        return z if z > 0 else z * 0
    return z / (1 + torch.exp(-z)) if name == "silu" else z * 0.5 * (1 + torch.erf(z / 2**0.5))
