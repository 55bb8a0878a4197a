"""Computes the sparse memory in plain loops over tokens, blocks and cells, for comparison.

:mod:`.oracle_methods` selects the blocks of a token. The rest is the same for all methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from fairseq_sffn.memory import MemoryOutput, Selection, SparseMemory
from tests.memory.cases import close
from tests.memory.oracle_methods import CHOOSE, Inputs, cells, hidden_unit

FUNCTIONS = {"sigmoid": lambda e: e / (1 + e), "sqrt_softplus": lambda e: torch.log(1 + e) ** 0.5}
"""Score function -> function of the exponential of a logit."""


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
    statistics: list[float]


def lookup(
    memory: SparseMemory,
    x_ND: Tensor,
    ids_NT: Tensor | None,
    padding_N: Tensor | None,
    factor: float,
    made: Selection,
    rng: Tensor,
    sequences: list[list[int]] | None = None,
) -> Expected:
    """Compute by the definitions what ``memory`` must return, one cell at a time.

    The balance loss is that of the micro-batch, or the mean over ``sequences`` of token numbers.
    """
    config = memory.config
    routed = config.routed
    active = routed.active_blocks
    all_tokens, all_blocks = range(len(x_ND)), range(routed.num_blocks)
    valid = [n for n in all_tokens if padding_N is None or not padding_N[n]]
    name = config.selector_class.name
    choice = CHOOSE[name](Inputs(memory, x_ND, ids_NT, valid, made, rng))
    blocks, scores = choice.blocks, choice.scores

    exps = totals = None
    if scores is not None:
        exps = [[[torch.exp(s) for s in head] for head in row] for row in scores]
        totals = [[sum(head) for head in row] for row in exps]
        heads = range(len(scores[0]))

    # Gate
    weights = None
    if config.gate_name != "none":
        weights = []
        for n in all_tokens:
            head_of = [a % len(heads) for a in range(active)]
            chosen = [exps[n][h][i] for h, i in zip(head_of, blocks[n], strict=True)]
            sigmoids = [e / (1 + e) for e in chosen]
            roots = [torch.sqrt(torch.log(1 + e)) for e in chosen]
            weights.append(
                {
                    "softmax": [e / totals[n][h] for e, h in zip(chosen, head_of, strict=True)],
                    "renormalized": [e / sum(chosen) for e in chosen],
                    "sigmoid": sigmoids,
                    "sigmoid_renormalized": [s / (sum(sigmoids) + 1e-20) for s in sigmoids],
                    "sqrt_softplus": roots,
                    "sqrt_softplus_renormalized": [r / (sum(roots) + 1e-20) for r in roots],
                }[config.gate_name]
            )
            weights[-1] = [config.route_scale * weight for weight in weights[-1]]

    # An assignment that the selector left out does not exist. Capacity is given to the first
    # choices of all tokens in order, then to second choices. Padding always fits.
    kept = choice.kept or [[True] * active for _ in all_tokens]
    assigned = [(n, a) for a in range(active) for n in valid if kept[n][a]]
    kept = [list(row) for row in kept]
    if factor:
        capacity = max(1, int(factor * math.ceil(len(assigned) / routed.num_blocks)))
        room = [capacity] * routed.num_blocks
        for n, a in assigned:
            kept[n][a] = room[blocks[n][a]] > 0
            room[blocks[n][a]] -= 1

    # Output
    rows = []
    for n in all_tokens:
        row = torch.zeros_like(x_ND[n])
        for a in range(active):
            for cell in cells(config, blocks[n][a]) if kept[n][a] else ():
                term = choice.hidden(n, a, cell) * memory.values[cell]
                row = row + (term if weights is None else weights[n][a] * term)
        for cell in range(config.shared_cells):
            row = (
                row + hidden_unit(config, memory.shared, x_ND[n], cell) * memory.shared.values[cell]
            )
        rows.append(row if memory.value_bias is None else row + memory.value_bias)
    output = torch.stack(rows)

    # Counts
    counts, importance = [0] * routed.num_blocks, [0.0] * routed.num_blocks
    for n, a in assigned:
        counts[blocks[n][a]] += 1
        factors = [table[n][a] for table in (weights, choice.coefficients) if table is not None]
        importance[blocks[n][a]] += abs(math.prod(float(factor) for factor in factors))
    dropped = sum(not kept[n][a] for n, a in assigned)
    if scores is None:
        statistics = [0, 0.0, 0.0]
        return Expected(
            output, blocks, weights, kept, *2 * [None], counts, dropped, importance, statistics
        )

    # Losses. The shares of a token's scores are their softmax, or those of the gate's scores.
    shares = [[[e / totals[n][h] for e in exps[n][h]] for h in heads] for n in all_tokens]
    function = config.gate_name.removesuffix("_renormalized")
    if function in FUNCTIONS and not name.startswith("pkm"):
        for n in all_tokens:
            each = [FUNCTIONS[function](e) for e in exps[n][0]]
            shares[n] = [[score / sum(each) for score in each]]
    balances = []
    for sequence in sequences or [list(all_tokens)]:
        real = [n for n in sequence if n in valid]
        load = [0] * routed.num_blocks
        for n, a in assigned:
            load[blocks[n][a]] += n in real and (a == 0 or name != "gshard")
        balance = torch.zeros((), dtype=x_ND.dtype)
        for n, h, i in product(real, heads, all_blocks):
            share = shares[n][h][i] / (len(real) * len(heads))
            balance = balance + share * load[i] / sum(load) * routed.num_blocks
        balances += [balance] if real else []
    balance = sum(balances) / max(len(balances), 1) + torch.zeros((), dtype=x_ND.dtype)
    if name == "sigma_moe":
        balance = _negative_entropy([exps[n][0] for n in valid])
    z = torch.zeros((), dtype=x_ND.dtype)
    statistics = [len(valid), 0.0, 0.0]
    for n, h in product(valid, heads):
        z = z + torch.log(totals[n][h]) ** 2 / (len(valid) * len(heads))
        chosen = [float(shares[n][h][i]) for i in blocks[n][h :: len(heads)]]
        each = [float(share) for share in shares[n][h]]
        statistics[1] += sum(chosen) / len(heads)
        bits = [-share * math.log(share) for share in each if share]
        statistics[2] += sum(bits) / math.log(max(len(each), 2)) / len(heads)
    return Expected(
        output, blocks, weights, kept, balance, z, counts, dropped, importance, statistics
    )


def _negative_entropy(exps: list[list[Tensor]]) -> Tensor:
    """Return sum_i P_i log P_i, where P_i is the mean probability of block i."""
    probs = [[e / sum(row) for e in row] for row in exps]
    means = [sum(column) / len(probs) for column in zip(*probs, strict=True)]
    return sum((p * torch.log(p) for p in means), torch.zeros((), dtype=torch.float64))


def assert_matches(
    memory: SparseMemory,
    x: Tensor,
    token_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    losses: bool = True,
    sequence_dim: int | None = None,
) -> MemoryOutput:
    """Check that a memory equals the loops to 1e-10: all results, and the gradients of x and of
    every parameter. Rows at padding are not compared, as nothing reads them. With ``sequence_dim``,
    the balance loss is that of each sequence."""
    x = x.detach().clone().requires_grad_()
    config = memory.config
    padding_N = None if padding_mask is None else padding_mask.flatten()
    ids_NT = None if token_ids is None else token_ids.reshape(-1, 2)
    factor = config.capacity_factor if memory.training else config.eval_capacity_factor

    rng = torch.get_rng_state()
    scope, sequences = {}, None
    if sequence_dim is not None:
        scope = dict(balance_scope="sequence", sequence_dim=sequence_dim)
        numbers = torch.arange(x[..., 0].numel()).view(x.shape[:-1])
        sequences = numbers.movedim(sequence_dim % x.ndim, -1).flatten(0, -2).tolist()
    actual = memory(x, token_ids, padding_mask=padding_mask, losses=losses, **scope)
    x_ND = x.reshape(-1, config.embed_dim)
    expected = lookup(memory, x_ND, ids_NT, padding_N, factor, actual.selection, rng, sequences)
    if not losses:
        none = dict(balance_loss=None, z_loss=None, statistics=[0, 0.0, 0.0])
        expected = replace(expected, **none)
    output_ND = actual.output.reshape(-1, config.embed_dim)
    read_N = torch.ones(len(output_ND), dtype=torch.bool) if padding_N is None else ~padding_N

    assert actual.output.shape == x.shape
    assert actual.selection.blocks.tolist() == expected.blocks
    assert actual.usage.counts.tolist() == expected.counts
    assert int(actual.usage.dropped) == expected.dropped
    close(actual.usage.importance, torch.tensor(expected.importance), "importance", 1e-5)
    statistics = torch.stack([t.double() for t in actual.usage[4:7]])
    close(statistics, torch.tensor(expected.statistics).double(), "statistics", 1e-5)
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


def _objective(output_ND: Tensor, result: MemoryOutput | Expected, cotangent_ND: Tensor) -> Tensor:
    total = (output_ND * cotangent_ND).sum()
    if result.balance_loss is not None:
        total = total + 0.7 * result.balance_loss + 0.3 * result.z_loss
    return total
