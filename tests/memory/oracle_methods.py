"""Computes the selection of each method in plain loops over tokens, blocks and cells.

A method is a function in ``CHOOSE``. It returns the blocks of each token and the values of their
cells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryConfig, Selection, SparseMemory
from fairseq_sffn.memory.assignment import TOLERANCE


class Inputs(NamedTuple):
    """The inputs of a selection.

    Attributes:
        made: the memory's own selection, for a method whose best choice is not unique.
        rng: state of the random generator before the selection, for a method that draws.
    """

    memory: SparseMemory
    x_ND: Tensor
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
        x_ND = inputs.x_ND - torch.tensor([total / number for total in sums])
        scored = inputs._replace(x_ND=x_ND)
    scored_pre, factor = _pre_activations(scored), _key_factor(inputs.memory)
    choice = _best_by_cells(
        scored, lambda n, cell: factor(cell) * scored_pre(n, cell), lambda z: sum(z) / len(z)
    )
    return choice._replace(hidden=_hidden(inputs, pre))


def choose_vanilla_m(inputs: Inputs) -> Choice:
    return _best_by_cells(inputs, _pre_activations(inputs), _aggregate(inputs))


def choose_lorkm(inputs: Inputs) -> Choice:
    selector, x_ND = inputs.memory.selector, inputs.x_ND

    @cache
    def down(n: int) -> list[Tensor]:
        return [(row * x_ND[n]).sum() for row in selector.down.weight]

    @cache
    def pre(n: int, cell: int) -> Tensor:
        total = selector.up.bias[cell] if selector.up.bias is not None else 0
        for r, feature in enumerate(down(n)):
            total = total + selector.up.weight[cell, r] * feature
        return total

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
        coefficients.append([e / sum(head) for e, head in zip(exps, heads, strict=True)])
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
    router, config = inputs.memory.selector.router, inputs.memory.config.routed
    scores = [[[(x_D * row_D).sum() for row_D in router]] for x_D in inputs.x_ND]
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
        draws = torch.rand(len(choice.blocks), 2, dtype=inputs.x_ND.dtype)
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

    @cache
    def low(n: int, i: int) -> list[Tensor]:
        return [(row_D * x_ND[n]).sum() for row_D in selector.down[i]]

    def hidden(n: int, a: int, cell: int) -> Tensor:
        i, within = divmod(cell, config.block_size)
        pre = _dot(low(n, i), selector.up[i, within])
        return _activation(config, pre if selector.bias is None else pre + selector.bias[i, within])

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
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:active]


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
    blocks, scores = [], []
    for x_D in inputs.x_ND:
        features = [(row * x_D).sum() for row in selector.query.weight]
        features = [f + b for f, b in zip(features, selector.query.bias, strict=True)]
        scores.append([])
        for h in range(num_heads):
            query = _norm(selector.norm, features[2 * half * h : 2 * half * (h + 1)])
            lefts = [_dot(query[:half], key) for key in selector.left[h]]
            rights = [_dot(query[half:], key) for key in selector.right[h]]
            scores[-1].append([left + right for left in lefts for right in rights])
        of_heads = [_best(head, active // num_heads) for head in scores[-1]]
        blocks.append([block for rank in zip(*of_heads, strict=True) for block in rank])
    return blocks, scores


def _norm(norm: nn.Module, features: list[Tensor]) -> list[Tensor]:
    if isinstance(norm, nn.Identity):
        return features
    mean = sum(features) / len(features)
    variance = sum((f - mean) ** 2 for f in features) / len(features)
    return [
        (f - mean) / torch.sqrt(variance + norm.eps) * norm.weight[i] + norm.bias[i]
        for i, f in enumerate(features)
    ]


def _dot(left: list[Tensor], right: Tensor) -> Tensor:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _aggregate(inputs: Inputs) -> Callable[[list[Tensor]], Tensor]:
    return {
        "avg": lambda values: sum(values) / len(values),
        "avg_abs": lambda values: sum(v if v > 0 else -v for v in values) / len(values),
        "max": lambda values: max(values, key=float),
        "min": lambda values: min(values, key=float),
        "l2": lambda values: torch.sqrt(sum(v * v for v in values)),
    }[inputs.memory.config.routed.selector_options.aggregate]


def cells(config: MemoryConfig, block: int) -> range:
    return range(block * config.block_size, (block + 1) * config.block_size)


def _pre_activations(inputs: Inputs) -> Callable[[int, int], Tensor]:
    memory, x_ND = inputs.memory, inputs.x_ND

    @cache
    def pre(n: int, cell: int) -> Tensor:
        return _product(x_ND[n], memory.keys, memory.key_bias, cell)

    return pre


def _key_factor(memory: SparseMemory) -> Callable[[int], Tensor | float]:
    """Return the function from a cell to the factor of its pre-activation in a mean key's score."""
    options = memory.config.selector_options

    @cache
    def factor(cell: int) -> Tensor | float:
        result: Tensor | float = 1.0
        if options.normalize_keys:
            result = result / torch.sqrt(sum(k * k for k in memory.keys[cell]))
        if options.value_norm:
            scale = memory.config.value_lr_scale
            result = result * torch.sqrt(sum((scale * v) ** 2 for v in memory.values[cell]))
        return result

    return factor


def _hidden(inputs: Inputs, pre: Callable[[int, int], Tensor]) -> Callable[[int, int, int], Tensor]:
    memory, x_ND = inputs.memory, inputs.x_ND

    def hidden(n: int, a: int, cell: int) -> Tensor:
        result = _activation(memory.config, pre(n, cell))
        if memory.config.glu:
            result = result * _product(x_ND[n], memory.up, memory.up_bias, cell)
        return result

    return hidden


def hidden_unit(config: MemoryConfig, tables: nn.Module, x_D: Tensor, cell: int) -> Tensor:
    """Return the factor of the value of a cell, from ``keys`` and ``up`` and their biases."""
    result = _activation(config, _product(x_D, tables.keys, tables.key_bias, cell))
    return result * _product(x_D, tables.up, tables.up_bias, cell) if config.glu else result


def _product(x_D: Tensor, table_CD: Tensor, bias_C: Tensor | None, cell: int) -> Tensor:
    product = (x_D * table_CD[cell]).sum()
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
