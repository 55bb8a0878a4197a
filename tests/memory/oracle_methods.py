"""Computes the selection of each method in plain loops over tokens, blocks and cells.

A method is a function in ``CHOOSE``. It returns the blocks of each token and the values of their
cells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fairseq_sffn.memory.assignment import TOLERANCE
from tests.memory.oracle_parts import (
    Choice,
    Inputs,
    add_up,
    aggregate,
    apply_activation,
    best,
    best_by_cells,
    best_products,
    dot,
    hidden_of,
    key_factor,
    pre_activations,
)


def choose_avgk(inputs: Inputs) -> Choice:
    pre, scored = pre_activations(inputs), inputs
    if inputs.memory.selector.hidden_totals is not None:
        *sums, number = inputs.memory.selector.hidden_totals.tolist()
        mean_D = torch.tensor([total / number for total in sums])
        scored = inputs._replace(x_ND=tuple(x_D - mean_D for x_D in inputs.x_ND))
    scored_pre, factor = pre_activations(scored), key_factor(inputs)
    choice = best_by_cells(
        scored, lambda n, cell: factor(cell) * scored_pre(n, cell), lambda z: add_up(z) / len(z)
    )
    return choice._replace(hidden=hidden_of(inputs, pre))


def choose_vanilla_m(inputs: Inputs) -> Choice:
    return best_by_cells(inputs, pre_activations(inputs), aggregate(inputs))


def choose_lorkm(inputs: Inputs) -> Choice:
    selector, x_ND = inputs.memory.selector, inputs.x_ND
    down_RD, up_CR = (layer.weight.unbind() for layer in (selector.down, selector.up))
    bias_C = None if selector.up.bias is None else selector.up.bias.unbind()

    @cache
    def down(n: int) -> Tensor:
        return torch.stack([dot(row_D, x_ND[n]) for row_D in down_RD])

    @cache
    def pre(n: int, cell: int) -> Tensor:
        total = dot(up_CR[cell], down(n))
        return total if bias_C is None else total + bias_C[cell]

    return best_by_cells(inputs, pre, aggregate(inputs))


def choose_pkm(inputs: Inputs) -> Choice:
    config = inputs.memory.config.routed
    blocks, scores = best_products(inputs)
    num_heads = len(scores[0])

    def selected(n: int, a: int) -> Tensor:
        return scores[n][a % num_heads][blocks[n][a]]

    if config.selector_options.coefficients == "activation":
        return Choice(blocks, lambda n, a, cell: apply_activation(config, selected(n, a)), scores)
    coefficients = []
    for n in range(len(blocks)):
        exps = [torch.exp(selected(n, a)) for a in range(config.routed.active_blocks)]
        heads = [exps[a % num_heads :: num_heads] for a in range(config.routed.active_blocks)]
        coefficients.append([e / add_up(head) for e, head in zip(exps, heads, strict=True)])
    return Choice(blocks, lambda n, a, cell: coefficients[n][a], scores, coefficients=coefficients)


def choose_pkm_ffn(inputs: Inputs) -> Choice:
    blocks, scores = best_products(inputs)
    return Choice(blocks, hidden_of(inputs, pre_activations(inputs)), scores)


def choose_rand_hash(inputs: Inputs) -> Choice:
    table = inputs.memory.selector.table.tolist()
    blocks = [table[current] for _, current in inputs.ids_NT.tolist()]
    return Choice(blocks, hidden_of(inputs, pre_activations(inputs)))


def choose_hash_layer(inputs: Inputs) -> Choice:
    table, config = inputs.memory.selector.table.tolist(), inputs.memory.config.routed
    if config.selector_options.table == "bigram":
        blocks = [
            [(table[0][before] + table[1][current]) % config.routed.num_blocks]
            for before, current in inputs.ids_NT.tolist()
        ]
    else:
        blocks = [[table[current]] for _, current in inputs.ids_NT.tolist()]
    return Choice(blocks, hidden_of(inputs, pre_activations(inputs)))


def choose_switch(inputs: Inputs) -> Choice:
    router_BD, config = inputs.memory.selector.router.unbind(), inputs.memory.config.routed
    scores = [[[dot(x_D, row_D) for row_D in router_BD]] for x_D in inputs.x_ND]
    blocks = [best(row[0], config.routed.active_blocks) for row in scores]
    return Choice(blocks, hidden_of(inputs, pre_activations(inputs)), scores)


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
        return torch.stack([dot(row_D, x_ND[n]) for row_D in down_BRD[i]])

    def hidden(n: int, a: int, cell: int) -> Tensor:
        pre = dot(low(n, cell // config.block_size), up_CR[cell])
        return apply_activation(config, pre if bias_C is None else pre + bias_C[cell])

    every = range(config.routed.num_blocks)
    norms = [[torch.sqrt(dot(low(n, i), low(n, i))) for i in every] for n in range(len(x_ND))]
    blocks = [best(row, config.routed.active_blocks) for row in norms]
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
        [i for i in best(row, config.routed.num_blocks) if i in left][: config.routed.active_blocks]
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
