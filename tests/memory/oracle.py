"""Computes the sparse memory in plain loops over tokens, blocks and cells, for comparison.

:mod:`.oracle_methods` selects the blocks of a token. The rest is the same for all methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fairseq_sffn.memory import MemoryOutput, Selection, SparseMemory
from tests.memory.cases import close
from tests.memory.oracle_methods import CHOOSE
from tests.memory.oracle_parts import Inputs, add_up, cells, hidden_unit, split

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
    tables, x_rows = split(memory), x_ND.unbind()
    choice = CHOOSE[name](Inputs(memory, tables, x_rows, ids_NT, valid, made, rng))
    blocks, scores = choice.blocks, choice.scores

    exps = totals = None
    if scores is not None:
        exps = [[[torch.exp(s) for s in head] for head in row] for row in scores]
        totals = [[add_up(head) for head in row] for row in exps]
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
    shared = split(memory.shared) if config.shared_cells else None
    rows = []
    for n in all_tokens:
        row = torch.zeros_like(x_rows[n])
        for a in range(active):
            for cell in cells(config, blocks[n][a]) if kept[n][a] else ():
                term = choice.hidden(n, a, cell) * tables.values[cell]
                row = row + (term if weights is None else weights[n][a] * term)
        for cell in range(config.shared_cells):
            row = row + hidden_unit(config, shared, x_rows[n], cell) * shared.values[cell]
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
            total = add_up(each)
            shares[n] = [[score / total for score in each]]
    balances = []
    for sequence in sequences or [list(all_tokens)]:
        real = [n for n in sequence if n in valid]
        load = [0] * routed.num_blocks
        for n, a in assigned:
            load[blocks[n][a]] += n in real and (a == 0 or name != "gshard")
        if real:
            of_all = [count / sum(load) * routed.num_blocks / len(real) for count in load]
            terms = [shares[n][h][i] * of_all[i] for n, h, i in product(real, heads, all_blocks)]
            balances.append(add_up(terms) / len(heads))
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
    probs = [[e / total for e in row] for row, total in zip(exps, map(add_up, exps), strict=True)]
    means = [sum(column) / len(probs) for column in zip(*probs, strict=True)]
    return sum((p * torch.log(p) for p in means), torch.zeros((), dtype=torch.float64))


class Loops:
    """What the loops compute of a memory and its inputs, for all memories with the same tables and
    options. These may have other engines.

    With ``sequence_dim``, the balance loss is that of each sequence.
    """

    def __init__(
        self,
        memory: SparseMemory,
        x: Tensor,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        sequence_dim: int | None = None,
    ) -> None:
        self.memory, self.rng = memory, torch.get_rng_state()
        self.x = x.detach().clone().requires_grad_()
        self.token_ids, self.padding_mask = token_ids, padding_mask
        self.scope: dict[str, Any] = {}
        self.sequences = None
        if sequence_dim is not None:
            self.scope = dict(balance_scope="sequence", sequence_dim=sequence_dim)
            numbers = torch.arange(x[..., 0].numel()).view(x.shape[:-1])
            self.sequences = numbers.movedim(sequence_dim % x.ndim, -1).flatten(0, -2).tolist()
        self.expected: Expected | None = None
        self.grads: dict[bool, tuple[Tensor, ...]] = {}

    def compute(self, made: Selection) -> Expected:
        """Compute the results at the first call, where a memory has made a selection."""
        if self.expected is None:
            memory, config = self.memory, self.memory.config
            factor = config.capacity_factor if memory.training else config.eval_capacity_factor
            ids_NT = None if self.token_ids is None else self.token_ids.reshape(-1, 2)
            padding_N = None if self.padding_mask is None else self.padding_mask.flatten()
            x_ND = self.x.reshape(-1, config.embed_dim)
            self.expected = lookup(
                memory, x_ND, ids_NT, padding_N, factor, made, self.rng, self.sequences
            )
            self.cotangent_ND = torch.randn_like(x_ND)
            if padding_N is not None:
                self.cotangent_ND[padding_N] = 0
        return self.expected

    def gradients(self, losses: bool) -> tuple[Tensor, ...]:
        """Return the gradients of x and of every parameter."""
        if losses not in self.grads:
            self.grads[losses] = self._gradients(
                self.memory, self.expected.output, self.expected, losses, retain_graph=True
            )
        return self.grads[losses]

    def _gradients(
        self,
        memory: SparseMemory,
        output_ND: Tensor,
        result: MemoryOutput | Expected,
        losses: bool,
        retain_graph: bool = False,
    ) -> tuple[Tensor, ...]:
        total = (output_ND * self.cotangent_ND).sum()
        if losses and result.balance_loss is not None:
            total = total + 0.7 * result.balance_loss + 0.3 * result.z_loss
        return torch.autograd.grad(
            total,
            (self.x, *memory.parameters()),
            allow_unused=True,
            materialize_grads=True,
            retain_graph=retain_graph,
        )

    def assert_equal(
        self, memory: SparseMemory, losses: bool = True, what: str = ""
    ) -> MemoryOutput:
        """Check that a memory equals the loops to 1e-10: all results, and the gradients of x and of
        every parameter. Rows at padding are not compared, as nothing reads them.

        Args:
            what: names the memory if it differs.
        """
        torch.set_rng_state(self.rng)
        actual = memory(
            self.x, self.token_ids, padding_mask=self.padding_mask, losses=losses, **self.scope
        )
        expected = self.compute(actual.selection)
        output_ND = actual.output.reshape(-1, memory.config.embed_dim)
        read_N = torch.ones(len(output_ND), dtype=torch.bool)
        if self.padding_mask is not None:
            read_N = ~self.padding_mask.flatten()

        assert actual.output.shape == self.x.shape, what
        assert actual.selection.blocks.tolist() == expected.blocks, what
        assert actual.usage.counts.tolist() == expected.counts, what
        assert int(actual.usage.dropped) == expected.dropped, what
        importance = torch.tensor(expected.importance)
        close(actual.usage.importance, importance, f"{what} importance", 1e-5)
        statistics = torch.stack([t.double() for t in actual.usage[4:7]])
        wanted = torch.tensor(expected.statistics if losses else [0, 0.0, 0.0]).double()
        close(statistics, wanted, f"{what} statistics", 1e-5)
        kept_NA = torch.tensor(expected.kept)
        if actual.selection.kept is None:
            assert kept_NA.all(), what
        else:
            assert torch.equal(actual.selection.kept[read_N], kept_NA[read_N]), what
        close(output_ND[read_N], expected.output[read_N], f"{what} output")
        assert (actual.selection.weights is None) == (expected.weights is None), what
        if expected.weights is not None:
            weights_NA = torch.stack([torch.stack(row) for row in expected.weights])
            close(actual.selection.weights, weights_NA, f"{what} weights")
        for name in ("balance_loss", "z_loss"):
            loss, wanted = getattr(actual, name), getattr(expected, name) if losses else None
            assert (loss is None) == (wanted is None), what
            if loss is not None:
                close(loss, wanted, f"{what} {name}")
        names = ("x", *(name for name, _ in memory.named_parameters()))
        got_grads = self._gradients(memory, output_ND, actual, losses)
        for name, got, wanted in zip(names, got_grads, self.gradients(losses), strict=True):
            close(got, wanted, f"{what} gradient of {name}")
        return actual


def assert_matches(
    memory: SparseMemory,
    x: Tensor,
    token_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    losses: bool = True,
    sequence_dim: int | None = None,
) -> MemoryOutput:
    """Check that a memory equals its loops; see :class:`Loops`."""
    return Loops(memory, x, token_ids, padding_mask, sequence_dim).assert_equal(memory, losses)
