"""Computes the selection of each method in plain loops over tokens, blocks and cells.

A method is a function in ``CHOOSE``. It returns the blocks of each token and the values of their
cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryConfig, Selection, SparseMemory
from fairseq_sffn.memory.assignment import TOLERANCE


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


def choose_avgk(inputs: Inputs) -> Choice:
    pre, scored = _pre_activations(inputs), inputs
    if inputs.memory.selector.hidden_totals is not None:
        *sums, number = inputs.memory.selector.hidden_totals.tolist()
        mean_D = torch.tensor([total / number for total in sums])
        scored = inputs._replace(x_ND=tuple(x_D - mean_D for x_D in inputs.x_ND))
    scored_pre, factor = _pre_activations(scored), _key_factor(inputs)
    choice = _best_by_cells(
        scored, lambda n, cell: factor(cell) * scored_pre(n, cell), lambda z: add_up(z) / len(z)
    )
    return choice._replace(hidden=_hidden(inputs, pre))


def choose_vanilla_m(inputs: Inputs) -> Choice:
    return _best_by_cells(inputs, _pre_activations(inputs), _aggregate(inputs))


def choose_lorkm(inputs: Inputs) -> Choice:
    selector, x_ND = inputs.memory.selector, inputs.x_ND
    down_RD, up_CR = (layer.weight.unbind() for layer in (selector.down, selector.up))
    bias_C = None if selector.up.bias is None else selector.up.bias.unbind()

    @cache
    def down(n: int) -> Tensor:
        return torch.stack([_dot(row_D, x_ND[n]) for row_D in down_RD])

    @cache
    def pre(n: int, cell: int) -> Tensor:
        total = _dot(up_CR[cell], down(n))
        return total if bias_C is None else total + bias_C[cell]

    return _best_by_cells(inputs, pre, _aggregate(inputs))


def choose_pkm(inputs: Inputs) -> Choice:
    config = inputs.memory.config.routed
    blocks, scores = _best_products(inputs)
    num_heads = len(scores[0])

    def selected(n: int, a: int) -> Tensor:
        return scores[n][a % num_heads][blocks[n][a]]

    if config.selector_options.coefficients == "activation":
        return Choice(blocks, lambda n, a, cell: _activation(config, selected(n, a)), scores)
    coefficients = []
    for n in range(len(blocks)):
        exps = [torch.exp(selected(n, a)) for a in range(config.routed.active_blocks)]
        heads = [exps[a % num_heads :: num_heads] for a in range(config.routed.active_blocks)]
        coefficients.append([e / add_up(head) for e, head in zip(exps, heads, strict=True)])
    return Choice(blocks, lambda n, a, cell: coefficients[n][a], scores, coefficients=coefficients)


def choose_pkm_ffn(inputs: Inputs) -> Choice:
    blocks, scores = _best_products(inputs)
    return Choice(blocks, _hidden(inputs, _pre_activations(inputs)), scores)


def choose_rand_hash(inputs: Inputs) -> Choice:
    table = inputs.memory.selector.table.tolist()
    blocks = [table[current] for _, current in inputs.ids_NT.tolist()]
    return Choice(blocks, _hidden(inputs, _pre_activations(inputs)))


def choose_hash_layer(inputs: Inputs) -> Choice:
    table, config = inputs.memory.selector.table.tolist(), inputs.memory.config.routed
    if config.selector_options.table == "bigram":
        blocks = [
            [(table[0][before] + table[1][current]) % config.routed.num_blocks]
            for before, current in inputs.ids_NT.tolist()
        ]
    else:
        blocks = [[table[current]] for _, current in inputs.ids_NT.tolist()]
    return Choice(blocks, _hidden(inputs, _pre_activations(inputs)))


def choose_switch(inputs: Inputs) -> Choice:
    router_BD, config = inputs.memory.selector.router.unbind(), inputs.memory.config.routed
    scores = [[[_dot(x_D, row_D) for row_D in router_BD]] for x_D in inputs.x_ND]
    blocks = [_best(row[0], config.routed.active_blocks) for row in scores]
    return Choice(blocks, _hidden(inputs, _pre_activations(inputs)), scores)


def choose_gshard(inputs: Inputs) -> Choice:
    choice = choose_switch(inputs)
    if not inputs.memory.training:
        return choice
    if inputs.memory.config.routed.selector_options.second_expert == "all":
        return choice
    with torch.random.fork_rng():
        torch.set_rng_state(inputs.rng)
        draws = torch.rand(len(choice.blocks), 2, dtype=inputs.x_ND[0].dtype)
    kept = []
    for (first, second), (row,), draw_A in zip(choice.blocks, choice.scores, draws, strict=True):
        weight = 1 / (1 + torch.exp(row[first] - row[second]))
        kept.append([True, bool(draw_A[1] < 2 * weight)])
    return choice._replace(kept=kept)


def choose_base(inputs: Inputs) -> Choice:
    choice = choose_switch(inputs)
    if not inputs.memory.training:
        return choice
    blocks, made = list(choice.blocks), inputs.made.blocks.tolist()
    for n in inputs.valid:
        blocks[n] = made[n]
    if inputs.valid:
        scores_NB = torch.tensor([[float(s) for s in choice.scores[n][0]] for n in inputs.valid])
        assert_balanced(torch.tensor(blocks)[inputs.valid, 0], scores_NB)
    return choice._replace(blocks=blocks)


def choose_aoe(inputs: Inputs) -> Choice:
    selector, config, x_ND = inputs.memory.selector, inputs.memory.config, inputs.x_ND
    down_BRD = [block.unbind() for block in selector.down.unbind()]
    up_CR = selector.up.flatten(0, 1).unbind()
    bias_C = None if selector.bias is None else selector.bias.flatten().unbind()

    @cache
    def low(n: int, i: int) -> Tensor:
        return torch.stack([_dot(row_D, x_ND[n]) for row_D in down_BRD[i]])

    def hidden(n: int, a: int, cell: int) -> Tensor:
        pre = _dot(low(n, cell // config.block_size), up_CR[cell])
        return _activation(config, pre if bias_C is None else pre + bias_C[cell])

    every = range(config.routed.num_blocks)
    norms = [[torch.sqrt(_dot(low(n, i), low(n, i))) for i in every] for n in range(len(x_ND))]
    blocks = [_best(row, config.routed.active_blocks) for row in norms]
    return Choice(blocks, hidden, [[row] for row in norms])


def choose_sigma_moe(inputs: Inputs) -> Choice:
    choice, config = choose_switch(inputs), inputs.memory.config
    if not inputs.memory.training:
        return choice
    with torch.random.fork_rng():
        torch.set_rng_state(inputs.rng)
        draws = torch.rand(config.routed.num_blocks).tolist()
    by_draw = sorted(range(config.routed.num_blocks), key=lambda i: -draws[i])
    dropout = config.selector_options.expert_dropout
    left = {i for i in by_draw if draws[i] >= dropout} | set(by_draw[: config.routed.active_blocks])
    blocks = [
        [i for i in _best(row, config.routed.num_blocks) if i in left][
            : config.routed.active_blocks
        ]
        for (row,) in choice.scores
    ]
    return choice._replace(blocks=blocks)


def choose_hash_moe(inputs: Inputs) -> Choice:
    return choose_switch(inputs)._replace(blocks=choose_rand_hash(inputs).blocks)


CHOOSE: dict[str, Callable[[Inputs], Choice]] = {
    "avgk": choose_avgk,
    "vanilla_m": choose_vanilla_m,
    "lorkm": choose_lorkm,
    "pkm": choose_pkm,
    "pkm_ffn": choose_pkm_ffn,
    "rand_hash": choose_rand_hash,
    "hash_layer": choose_hash_layer,
    "switch": choose_switch,
    "gshard": choose_gshard,
    "base": choose_base,
    "moe": choose_switch,
    "aoe": choose_aoe,
    "sigma_moe": choose_sigma_moe,
    "hash_moe": choose_hash_moe,
}


def _best(scores: list[Tensor], active: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:active]


def _best_by_cells(
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
    blocks = [_best(row[0], config.routed.active_blocks) for row in scores]
    return Choice(blocks, _hidden(inputs, pre), scores)


def _best_products(inputs: Inputs) -> tuple[list[list[int]], list[list[list[Tensor]]]]:
    """Select blocks and scores by product keys, from all products."""
    selector, active = inputs.memory.selector, inputs.memory.config.routed.active_blocks
    num_heads, _, half = selector.left.shape
    weight_QD, bias_Q = selector.query.weight.unbind(), selector.query.bias.unbind()
    left_HB, right_HB = (
        [keys.unbind() for keys in table.unbind()] for table in (selector.left, selector.right)
    )
    blocks, scores = [], []
    for x_D in inputs.x_ND:
        features = [_dot(row_D, x_D) + b for row_D, b in zip(weight_QD, bias_Q, strict=True)]
        scores.append([])
        for h in range(num_heads):
            query = _norm(selector.norm, features[2 * half * h : 2 * half * (h + 1)])
            first, second = torch.stack(query[:half]), torch.stack(query[half:])
            lefts = [_dot(first, key) for key in left_HB[h]]
            rights = [_dot(second, key) for key in right_HB[h]]
            scores[-1].append([left + right for left in lefts for right in rights])
        of_heads = [_best(head, active // num_heads) for head in scores[-1]]
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


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum()


def add_up(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(values).sum()


def _aggregate(inputs: Inputs) -> Callable[[list[Tensor]], Tensor]:
    return {
        "avg": lambda values: add_up(values) / len(values),
        "avg_abs": lambda values: add_up([v if v > 0 else -v for v in values]) / len(values),
        "max": lambda values: max(values, key=float),
        "min": lambda values: min(values, key=float),
        "l2": lambda values: torch.sqrt(add_up([v * v for v in values])),
    }[inputs.memory.config.routed.selector_options.aggregate]


def cells(config: MemoryConfig, block: int) -> range:
    return range(block * config.block_size, (block + 1) * config.block_size)


def _pre_activations(inputs: Inputs) -> Callable[[int, int], Tensor]:
    tables, x_ND = inputs.tables, inputs.x_ND

    @cache
    def pre(n: int, cell: int) -> Tensor:
        return _product(x_ND[n], tables.keys, tables.key_bias, cell)

    return pre


def _key_factor(inputs: Inputs) -> Callable[[int], Tensor | float]:
    """Return the function from a cell to the factor of its pre-activation in a mean key's score."""
    config, tables = inputs.memory.config, inputs.tables
    options = config.selector_options

    @cache
    def factor(cell: int) -> Tensor | float:
        result: Tensor | float = 1.0
        if options.normalize_keys:
            result = result / torch.sqrt(_dot(tables.keys[cell], tables.keys[cell]))
        if options.value_norm:
            value_D = config.value_lr_scale * tables.values[cell]
            result = result * torch.sqrt(_dot(value_D, value_D))
        return result

    return factor


def _hidden(inputs: Inputs, pre: Callable[[int, int], Tensor]) -> Callable[[int, int, int], Tensor]:
    config, tables, x_ND = inputs.memory.config, inputs.tables, inputs.x_ND

    def hidden(n: int, a: int, cell: int) -> Tensor:
        result = _activation(config, pre(n, cell))
        if config.glu:
            result = result * _product(x_ND[n], tables.up, tables.up_bias, cell)
        return result

    return hidden


def hidden_unit(config: MemoryConfig, tables: Tables, x_D: Tensor, cell: int) -> Tensor:
    """Return the factor of the value of a cell, from ``keys`` and ``up`` and their biases."""
    result = _activation(config, _product(x_D, tables.keys, tables.key_bias, cell))
    return result * _product(x_D, tables.up, tables.up_bias, cell) if config.glu else result


def _product(
    x_D: Tensor, table_CD: Sequence[Tensor], bias_C: Sequence[Tensor] | None, cell: int
) -> Tensor:
    product = _dot(x_D, table_CD[cell])
    return product if bias_C is None else product + bias_C[cell]


def _activation(config: MemoryConfig, z: Tensor) -> Tensor:
    name = config.glu or config.activation
    if name == "relu":
        return z if z > 0 else z * 0
    return z / (1 + torch.exp(-z)) if name == "silu" else z * 0.5 * (1 + torch.erf(z / 2**0.5))


def assert_balanced(blocks_N: Tensor, scores_NB: Tensor) -> None:
    """Check that loads differ by at most one, and that the scores have the sum that
    ``balanced_assignment`` guarantees."""
    num_tokens, num_blocks = scores_NB.shape
    scores_NB = scores_NB.double()
    assert blocks_N.shape == (num_tokens,) and blocks_N.dtype == torch.int64
    loads_B = torch.bincount(blocks_N, minlength=num_blocks)
    assert len(loads_B) == num_blocks and loads_B.max() - loads_B.min() <= 1
    got = float(scores_NB.gather(1, blocks_N.unsqueeze(1)).sum())
    spread = float(scores_NB.std(correction=0))
    wanted = best_balanced_sum(scores_NB)
    rounding = 1e-9 * num_tokens * float(scores_NB.abs().max())
    assert got <= wanted + rounding
    assert got >= wanted - num_tokens * TOLERANCE * spread - rounding


def best_balanced_sum(scores_NB: Tensor) -> float:
    """Return the highest sum of scores of an assignment whose loads differ by at most one. scipy
    solves it: each block has places that must be taken, which get a bonus, and one that may stay
    empty."""
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_blocks = scores_NB.shape
    must_NP = scores_NB.repeat_interleave(num_tokens // num_blocks, dim=1)
    bonus = 2 * num_tokens * float(scores_NB.max() - scores_NB.min()) + 1
    places_NP = torch.cat([must_NP + bonus, scores_NB], dim=1)
    tokens, places = linear_sum_assignment(places_NP.numpy(), maximize=True)
    scores_NP = torch.cat([must_NP, scores_NB], dim=1)
    return float(scores_NP[tokens, places].sum())
