"""The sparse memory in plain loops over tokens, blocks and cells: what the tests compare with.

A method is one function, in ``CHOOSE``, that says which blocks a token uses and what their cells
contribute; the rest of :func:`lookup` is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryConfig, MemoryOutput, ProcessGroups, Selection, SparseMemory
from fairseq_sffn.memory.assignment import TOLERANCE
from fairseq_sffn.memory.compute import kernels
from fairseq_sffn.memory.selectors.gshard import GShard
from fairseq_sffn.memory.selectors.hash_layer import HashLayer
from fairseq_sffn.memory.selectors.lorkm import LoRKM
from fairseq_sffn.memory.selectors.pkm import PKM
from fairseq_sffn.memory.selectors.vanilla_m import VanillaM

NATIVE = pytest.mark.skipif(kernels.load() is None, reason="no C++ compiler here")
NATIVE_ENGINES = ("native_loop", "native_embedding_bag")
CPU_ENGINES = ["loop", "embedding_bag", "masked", "tiled"]
CPU_ENGINES += [pytest.param(name, marks=NATIVE) for name in NATIVE_ENGINES]
"""Those that compute in fp64."""

BIGRAM = HashLayer.Config(table="bigram")
SAMPLED = GShard.Config(second_expert="sampled")
UNNORMED = PKM.Config(heads=2, coefficients="activation", query_norm="none", query_dim=6)
CASES = {
    "avgk-g1": dict(selector="avgk", num_cells=32, block_size=1, active_blocks=8),
    "avgk-g3": dict(selector="avgk", num_cells=24, block_size=3, active_blocks=4),
    "avgk-g4": dict(selector="avgk", num_cells=32, block_size=4, active_blocks=4),
    "avgk-g16": dict(selector="avgk", num_cells=64, block_size=16, active_blocks=2),
    "avgk-whole": dict(selector="avgk", num_cells=64, block_size=64, active_blocks=1),
    "vanilla_m-g1": dict(selector="vanilla_m", num_cells=24, block_size=1, active_blocks=6),
    **{
        f"vanilla_m-{aggregate}": dict(
            selector=VanillaM.Config(aggregate), num_cells=24, block_size=4, active_blocks=2
        )
        for aggregate in ("avg", "avg_abs", "max", "min")
    },
    "lorkm-g1": dict(selector=LoRKM.Config(rank=3), num_cells=24, block_size=1, active_blocks=6),
    "lorkm-g4": dict(
        selector=LoRKM.Config("max", rank=3), num_cells=24, block_size=4, active_blocks=2
    ),
    "pkm": dict(selector=PKM.Config(heads=2), num_cells=12, block_size=1, active_blocks=6),
    "pkm-activation": dict(selector=UNNORMED, num_cells=12, block_size=1, active_blocks=6),
    "pkm-prime": dict(selector=PKM.Config(heads=1), num_cells=7, block_size=1, active_blocks=3),
    "pkm_ffn": dict(selector="pkm_ffn", num_cells=24, block_size=1, active_blocks=5),
    "rand_hash": dict(selector="rand_hash", num_cells=24, block_size=3, active_blocks=3),
    "hash_layer": dict(selector="hash_layer", num_cells=32, block_size=8, active_blocks=1),
    "hash_layer-bigram": dict(selector=BIGRAM, num_cells=32, block_size=8, active_blocks=1),
    "switch-top1": dict(selector="switch", num_cells=32, block_size=8, active_blocks=1),
    "switch-top2": dict(selector="switch", num_cells=32, block_size=8, active_blocks=2),
    "gshard": dict(selector="gshard", num_cells=16, block_size=4, active_blocks=2),
    "gshard-top3": dict(selector="gshard", num_cells=16, block_size=4, active_blocks=3),
    "gshard-sampled": dict(selector=SAMPLED, num_cells=16, block_size=4, active_blocks=2),
    "base": dict(selector="base", num_cells=16, block_size=4, active_blocks=1),
}
GATES = ["none", "softmax", "renormalized", "sigmoid"]
UNSCORED = ["rand_hash", "hash_layer", "hash_layer-bigram"]
CASE_GATES = [(case, gate) for case in CASES for gate in GATES if case not in UNSCORED]
CASE_GATES += [(case, "none") for case in UNSCORED]
VOCAB_SIZE = 10


def build(
    case: str = "avgk-g4",
    dtype: torch.dtype = torch.float64,
    groups: ProcessGroups | None = None,
    **changes,
) -> SparseMemory:
    """A memory of one of the cases, without a gate where it has no scores. Scores and gates differ
    clearly: init_scale is 2, and norms are not those they start as."""
    sizes = dict(embed_dim=8, vocab_size=VOCAB_SIZE, init_scale=2.0)
    if case in UNSCORED:
        changes.pop("gate", None)
    memory = SparseMemory(MemoryConfig(**{**sizes, **CASES[case], **changes}), groups)
    for module in memory.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return memory.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states (*shape, 8), and the last two token ids at each of them (*shape, 2)."""
    return torch.randn(*shape, 8, dtype=dtype), torch.randint(VOCAB_SIZE, (*shape, 2))


def grads_of(
    memory: SparseMemory, x: Tensor, token_ids: Tensor | None, cotangent: Tensor, losses=True
) -> tuple[MemoryOutput, dict[str, Tensor]]:
    """What a memory returns, and its output and all gradients by name."""
    x = x.clone().requires_grad_()
    out = memory(x, token_ids, losses=losses)
    (out.output * cotangent).sum().backward()
    grads = {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}
    return out, {"output": out.output, "x": x.grad, **grads}


class Inputs(NamedTuple):
    """What a method chooses by. ``made`` is what the memory selected, for a method whose best
    choice is not unique; ``rng`` the state before that, for one that draws lots."""

    memory: SparseMemory
    x_ND: Tensor
    ids_NT: Tensor | None
    valid: list[int]
    made: Selection
    rng: Tensor


class Choice(NamedTuple):
    """``hidden(n, a, cell)`` is what multiplies the value of a cell of the a-th block of token n;
    ``scores[n][h][i]`` is what head h gives block i; ``kept`` is all by default."""

    blocks: list[list[int]]
    hidden: Callable[[int, int, int], Tensor]
    scores: list[list[list[Tensor]]] | None = None
    kept: list[list[bool]] | None = None
    coefficients: list[list[Tensor]] | None = None


@dataclass
class Expected:
    output: Tensor
    blocks: list[list[int]]
    weights: list[list[Tensor]] | None
    kept: list[list[bool]]
    balance_loss: Tensor | None
    z_loss: Tensor | None
    counts: list[int]
    dropped: int
    importance: list[float]


# The methods


def choose_avgk(inputs: Inputs) -> Choice:
    pre, scored = _pre_activations(inputs), inputs
    if inputs.memory.selector.hidden_totals is not None:
        *sums, number = inputs.memory.selector.hidden_totals.tolist()
        x_ND = inputs.x_ND - torch.tensor([total / number for total in sums])
        scored = inputs._replace(x_ND=x_ND)
    choice = _best_by_cells(scored, _pre_activations(scored), lambda z: sum(z) / len(z))
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
    config = inputs.memory.config
    blocks, scores = _best_products(inputs)
    num_heads = len(scores[0])

    def selected(n: int, a: int) -> Tensor:
        return scores[n][a % num_heads][blocks[n][a]]

    if config.selector_options.coefficients == "activation":
        return Choice(blocks, lambda n, a, cell: _activation(config, selected(n, a)), scores)
    coefficients = []
    for n in range(len(blocks)):
        exps = [torch.exp(selected(n, a)) for a in range(config.active_blocks)]
        heads = [exps[a % num_heads :: num_heads] for a in range(config.active_blocks)]
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
    table, config = inputs.memory.selector.table.tolist(), inputs.memory.config
    if config.selector_options.table == "bigram":
        blocks = [
            [(table[0][before] + table[1][current]) % config.num_blocks]
            for before, current in inputs.ids_NT.tolist()
        ]
    else:
        blocks = [[table[current]] for _, current in inputs.ids_NT.tolist()]
    return Choice(blocks, _hidden(inputs, _pre_activations(inputs)))


def choose_switch(inputs: Inputs) -> Choice:
    router, config = inputs.memory.selector.router, inputs.memory.config
    scores = [[[(x_D * row_D).sum() for row_D in router]] for x_D in inputs.x_ND]
    blocks = [_best(row[0], config.active_blocks) for row in scores]
    return Choice(blocks, _hidden(inputs, _pre_activations(inputs)), scores)


def choose_gshard(inputs: Inputs) -> Choice:
    choice = choose_switch(inputs)
    if not inputs.memory.training:
        return choice
    if inputs.memory.config.selector_options.second_expert == "all":
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
}


def _best(scores: list[Tensor], active: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:active]


def _best_by_cells(
    inputs: Inputs,
    pre: Callable[[int, int], Tensor],
    aggregate: Callable[[list[Tensor]], Tensor],
) -> Choice:
    config = inputs.memory.config
    scores = [
        [
            [
                aggregate([pre(n, cell) for cell in _cells(config, i)])
                for i in range(config.num_blocks)
            ]
        ]
        for n in range(len(inputs.x_ND))
    ]
    blocks = [_best(row[0], config.active_blocks) for row in scores]
    return Choice(blocks, _hidden(inputs, pre), scores)


def _best_products(inputs: Inputs) -> tuple[list[list[int]], list[list[list[Tensor]]]]:
    """Blocks and scores by product keys, from all products."""
    selector, active = inputs.memory.selector, inputs.memory.config.active_blocks
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
    }[inputs.memory.config.selector_options.aggregate]


def _cells(config: MemoryConfig, block: int) -> range:
    return range(block * config.block_size, (block + 1) * config.block_size)


def _pre_activations(inputs: Inputs) -> Callable[[int, int], Tensor]:
    memory, x_ND = inputs.memory, inputs.x_ND

    @cache
    def pre(n: int, cell: int) -> Tensor:
        product = (x_ND[n] * memory.keys[cell]).sum()
        return product if memory.key_bias is None else product + memory.key_bias[cell]

    return pre


def _hidden(inputs: Inputs, pre: Callable[[int, int], Tensor]) -> Callable[[int, int, int], Tensor]:
    return lambda n, a, cell: _activation(inputs.memory.config, pre(n, cell))


def _activation(config: MemoryConfig, z: Tensor) -> Tensor:
    if config.activation == "relu":
        return z if z > 0 else z * 0
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def assert_balanced(blocks_N: Tensor, scores_NB: Tensor) -> None:
    """Loads differ by at most one, and the scores sum to what ``balanced_assignment`` promises."""
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
    """The highest sum of scores of an assignment whose loads differ by at most one, by scipy: each
    block has places that must be taken, worth a bonus, and one that may stay empty."""
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_blocks = scores_NB.shape
    must_NP = scores_NB.repeat_interleave(num_tokens // num_blocks, dim=1)
    bonus = 2 * num_tokens * float(scores_NB.max() - scores_NB.min()) + 1
    places_NP = torch.cat([must_NP + bonus, scores_NB], dim=1)
    tokens, places = linear_sum_assignment(places_NP.numpy(), maximize=True)
    scores_NP = torch.cat([must_NP, scores_NB], dim=1)
    return float(scores_NP[tokens, places].sum())


# The rest


def lookup(
    memory: SparseMemory,
    x_ND: Tensor,
    ids_NT: Tensor | None,
    padding_N: Tensor | None,
    factor: float,
    made: Selection,
    rng: Tensor,
) -> Expected:
    """What ``memory`` must give, by the definitions, one cell at a time."""
    config = memory.config
    active = config.active_blocks
    all_tokens, all_blocks = range(len(x_ND)), range(config.num_blocks)
    valid = [n for n in all_tokens if padding_N is None or not padding_N[n]]
    name = config.selector_class.name
    choice = CHOOSE[name](Inputs(memory, x_ND, ids_NT, valid, made, rng))
    blocks, scores = choice.blocks, choice.scores

    exps = totals = None
    if scores is not None:
        exps = [[[torch.exp(s) for s in head] for head in row] for row in scores]
        totals = [[sum(head) for head in row] for row in exps]
        heads = range(len(scores[0]))

    # Gate.
    weights = None
    if config.gate_name != "none":
        weights = []
        for n in all_tokens:
            head_of = [a % len(heads) for a in range(active)]
            chosen = [exps[n][h][i] for h, i in zip(head_of, blocks[n], strict=True)]
            weights.append(
                {
                    "softmax": [e / totals[n][h] for e, h in zip(chosen, head_of, strict=True)],
                    "renormalized": [e / sum(chosen) for e in chosen],
                    "sigmoid": [e / (1 + e) for e in chosen],
                }[config.gate_name]
            )

    # What the selector left out is no assignment. Capacity: first choices of all tokens in order,
    # then second ones; padding always fits.
    kept = choice.kept or [[True] * active for _ in all_tokens]
    assigned = [(n, a) for a in range(active) for n in valid if kept[n][a]]
    kept = [list(row) for row in kept]
    if factor:
        capacity = max(1, int(factor * math.ceil(len(assigned) / config.num_blocks)))
        room = [capacity] * config.num_blocks
        for n, a in assigned:
            kept[n][a] = room[blocks[n][a]] > 0
            room[blocks[n][a]] -= 1

    # Output.
    rows = []
    for n in all_tokens:
        row = torch.zeros_like(x_ND[n])
        for a in range(active):
            for cell in _cells(config, blocks[n][a]) if kept[n][a] else ():
                term = choice.hidden(n, a, cell) * memory.values[cell]
                row = row + (term if weights is None else weights[n][a] * term)
        rows.append(row if memory.value_bias is None else row + memory.value_bias)
    output = torch.stack(rows)

    # Losses and counts.
    counts, balance_counts = ([0] * config.num_blocks for _ in range(2))
    importance = [0.0] * config.num_blocks
    for n, a in assigned:
        counts[blocks[n][a]] += 1
        balance_counts[blocks[n][a]] += a == 0 or name != "gshard"
        factors = [table[n][a] for table in (weights, choice.coefficients) if table is not None]
        importance[blocks[n][a]] += abs(math.prod(float(factor) for factor in factors))
    dropped = sum(not kept[n][a] for n, a in assigned)
    balance = z = None
    if scores is not None:
        balance = z = torch.zeros((), dtype=x_ND.dtype)
        for n in valid:
            for h in heads:
                share = 1 / (len(valid) * len(heads))
                for i in all_blocks:
                    load = balance_counts[i] / sum(balance_counts) * config.num_blocks
                    balance = balance + share * exps[n][h][i] / totals[n][h] * load
                z = z + share * torch.log(totals[n][h]) ** 2
    return Expected(output, blocks, weights, kept, balance, z, counts, dropped, importance)


def assert_matches(
    memory: SparseMemory,
    x: Tensor,
    token_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    losses: bool = True,
) -> MemoryOutput:
    """The memory equals the loops to 1e-10: all that it returns, and the gradients of x and of
    every parameter. Rows at padding are not compared: nobody reads them."""
    x = x.detach().clone().requires_grad_()
    config = memory.config
    padding_N = None if padding_mask is None else padding_mask.flatten()
    ids_NT = None if token_ids is None else token_ids.reshape(-1, 2)
    factor = config.capacity_factor if memory.training else config.eval_capacity_factor

    rng = torch.get_rng_state()
    actual = memory(x, token_ids, padding_mask=padding_mask, losses=losses)
    x_ND = x.reshape(-1, config.embed_dim)
    expected = lookup(memory, x_ND, ids_NT, padding_N, factor, actual.selection, rng)
    if not losses:
        expected = replace(expected, balance_loss=None, z_loss=None)
    output_ND = actual.output.reshape(-1, config.embed_dim)
    read_N = torch.ones(len(output_ND), dtype=torch.bool) if padding_N is None else ~padding_N

    assert actual.output.shape == x.shape
    assert actual.selection.blocks.tolist() == expected.blocks
    assert actual.usage.counts.tolist() == expected.counts
    assert int(actual.usage.dropped) == expected.dropped
    close(actual.usage.importance, torch.tensor(expected.importance), "importance", 1e-5)
    kept_NA = torch.tensor(expected.kept)
    if actual.selection.kept is None:
        assert kept_NA.all()
    else:
        assert torch.equal(actual.selection.kept[read_N], kept_NA[read_N])
    close(output_ND[read_N], expected.output[read_N])
    assert (actual.selection.weights is None) == (expected.weights is None)
    if expected.weights is not None:
        close(actual.selection.weights, torch.stack([torch.stack(row) for row in expected.weights]))
    for name in ("balance_loss", "z_loss"):
        loss = getattr(actual, name)
        assert (loss is None) == (getattr(expected, name) is None)
        if loss is not None:
            close(loss, getattr(expected, name), name)

    names, tensors = zip(("x", x), *memory.named_parameters(), strict=True)
    cotangent_ND = torch.randn_like(output_ND) * read_N.unsqueeze(1)
    options = dict(allow_unused=True, materialize_grads=True)
    actual_grads = torch.autograd.grad(
        _objective(output_ND, actual, cotangent_ND), tensors, **options
    )
    expected_grads = torch.autograd.grad(
        _objective(expected.output, expected, cotangent_ND), tensors, **options
    )
    for name, got, wanted in zip(names, actual_grads, expected_grads, strict=True):
        close(got, wanted, f"gradient of {name}")
    return actual


def close(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{what}\n{text}"
    )


def _objective(output_ND: Tensor, result: MemoryOutput | Expected, cotangent_ND: Tensor) -> Tensor:
    total = (output_ND * cotangent_ND).sum()
    if result.balance_loss is not None:
        total = total + 0.7 * result.balance_loss + 0.3 * result.z_loss
    return total
