"""The sparse memory in plain loops over tokens, blocks and cells: what the tests compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_sffn.memory import MemoryConfig, MemoryOutput, SparseMemory

CASES = {
    "avgk-g1": dict(selector="avgk", num_cells=32, block_size=1, active_blocks=8),
    "avgk-g3": dict(selector="avgk", num_cells=24, block_size=3, active_blocks=4),
    "avgk-g4": dict(selector="avgk", num_cells=32, block_size=4, active_blocks=4),
    "avgk-g16": dict(selector="avgk", num_cells=64, block_size=16, active_blocks=2),
    "avgk-whole": dict(selector="avgk", num_cells=64, block_size=64, active_blocks=1),
    "switch-top1": dict(selector="switch", num_cells=32, block_size=8, active_blocks=1),
    "switch-top2": dict(selector="switch", num_cells=32, block_size=8, active_blocks=2),
    "hash_layer": dict(selector="hash_layer", num_cells=32, block_size=8, active_blocks=1),
}
GATES = ["none", "softmax", "renormalized", "sigmoid"]
CASE_GATES = [(case, gate) for case in CASES for gate in GATES if case != "hash_layer"]
CASE_GATES.append(("hash_layer", "none"))
VOCAB_SIZE = 10


def build(case: str = "avgk-g4", dtype: torch.dtype = torch.float64, **changes) -> SparseMemory:
    """A memory of one of the cases; init_scale 2 makes scores and gates differ clearly."""
    sizes = dict(embed_dim=8, vocab_size=VOCAB_SIZE, init_scale=2.0)
    return SparseMemory(MemoryConfig(**{**sizes, **CASES[case], **changes})).to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states (*shape, 8), and token ids (*shape)."""
    return torch.randn(*shape, 8, dtype=dtype), torch.randint(VOCAB_SIZE, shape)


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


def lookup(
    memory: SparseMemory,
    x_ND: Tensor,
    token_ids_N: Tensor | None = None,
    padding_N: Tensor | None = None,
    factor: float = 0.0,
) -> Expected:
    """What ``memory`` must give, by the definitions, one cell at a time."""
    config = memory.config
    block_size, active = config.block_size, config.active_blocks
    all_tokens, all_blocks = range(len(x_ND)), range(config.num_blocks)
    valid = [n for n in all_tokens if padding_N is None or not padding_N[n]]

    def cells(block: int) -> range:
        return range(block * block_size, (block + 1) * block_size)

    def pre_activation(n: int, cell: int) -> Tensor:
        product = (x_ND[n] * memory.keys[cell]).sum()
        return product if memory.key_bias is None else product + memory.key_bias[cell]

    def activation(z: Tensor) -> Tensor:
        if config.activation == "relu":
            return z if z > 0 else z * 0
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    def score(n: int, block: int) -> Tensor:
        if config.selector_class.name == "switch":
            return (x_ND[n] * memory.selector.router[block]).sum()
        return sum(pre_activation(n, cell) for cell in cells(block)) / block_size

    # Selection.
    scores = None
    if config.selector_class.name == "hash_layer":
        blocks = [[int(memory.selector.table[token_ids_N[n]])] for n in all_tokens]
    else:
        scores = [[score(n, i) for i in all_blocks] for n in all_tokens]
        blocks = [sorted(all_blocks, key=lambda i: -scores[n][i])[:active] for n in all_tokens]

    exps = totals = None
    if scores is not None:
        exps = [[torch.exp(s) for s in row] for row in scores]
        totals = [sum(row) for row in exps]

    # Gate.
    weights = None
    if config.gate_name != "none":
        weights = []
        for n in all_tokens:
            chosen = [exps[n][i] for i in blocks[n]]
            weights.append(
                {
                    "softmax": [e / totals[n] for e in chosen],
                    "renormalized": [e / sum(chosen) for e in chosen],
                    "sigmoid": [e / (1 + e) for e in chosen],
                }[config.gate_name]
            )

    # Capacity: first choices of all tokens in order, then second ones; padding always fits.
    kept = [[True] * active for _ in all_tokens]
    if factor:
        capacity = max(1, int(factor * math.ceil(len(valid) * active / config.num_blocks)))
        room = [capacity] * config.num_blocks
        for a in range(active):
            for n in valid:
                kept[n][a] = room[blocks[n][a]] > 0
                room[blocks[n][a]] -= 1

    # Output.
    rows = []
    for n in all_tokens:
        row = torch.zeros_like(x_ND[n])
        for a in range(active):
            for cell in cells(blocks[n][a]) if kept[n][a] else ():
                term = activation(pre_activation(n, cell)) * memory.values[cell]
                row = row + (term if weights is None else weights[n][a] * term)
        rows.append(row if memory.value_bias is None else row + memory.value_bias)
    output = torch.stack(rows)

    # Losses and counts.
    counts = [sum(blocks[n].count(i) for n in valid) for i in all_blocks]
    dropped = sum(not fits for n in valid for fits in kept[n])
    balance = z = None
    if scores is not None:
        balance = z = torch.zeros((), dtype=x_ND.dtype)
        for n in valid:
            for i in all_blocks:
                share = counts[i] / sum(counts)
                probability = exps[n][i] / totals[n]
                balance = balance + config.num_blocks * probability / len(valid) * share
            z = z + torch.log(totals[n]) ** 2 / len(valid)
    return Expected(output, blocks, weights, kept, balance, z, counts, dropped)


def assert_matches(
    memory: SparseMemory,
    x: Tensor,
    token_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> MemoryOutput:
    """The memory equals the loops to 1e-10: all that it returns, and the gradients of x and of
    every parameter. Rows at padding are not compared: nobody reads them."""
    x = x.detach().clone().requires_grad_()
    config = memory.config
    padding_N = None if padding_mask is None else padding_mask.flatten()
    ids_N = None if token_ids is None else token_ids.flatten()
    factor = config.capacity_factor if memory.training else config.eval_capacity_factor

    actual = memory(x, token_ids, padding_mask=padding_mask)
    expected = lookup(memory, x.reshape(-1, config.embed_dim), ids_N, padding_N, factor)
    output_ND = actual.output.reshape(-1, config.embed_dim)
    read_N = torch.ones(len(output_ND), dtype=torch.bool) if padding_N is None else ~padding_N

    assert actual.output.shape == x.shape
    assert actual.selection.blocks.tolist() == expected.blocks
    assert actual.usage.counts.tolist() == expected.counts
    assert int(actual.usage.dropped) == expected.dropped
    if factor:
        assert (
            actual.selection.kept[read_N].tolist() == torch.tensor(expected.kept)[read_N].tolist()
        )
    close(output_ND[read_N], expected.output[read_N])
    assert (actual.selection.weights is None) == (expected.weights is None)
    if expected.weights is not None:
        close(actual.selection.weights, torch.stack([torch.stack(row) for row in expected.weights]))
    for name in ("balance_loss", "z_loss"):
        loss = getattr(actual, name)
        assert (loss is None) == (getattr(expected, name) is None)
        if loss is not None:
            close(loss, getattr(expected, name))

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
