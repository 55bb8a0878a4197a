import copy
import dataclasses
from itertools import product

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from fairseq_sffn.memory import ConfigError, MemoryConfig, Selection, SparseMemory
from fairseq_sffn.memory.compute import (
    choose_engine,
    embedding_bag_kernels,
    engines,
    kernels,
    tiled_torch,
    tiles,
)
from tests.memory.cases import (
    CASES,
    CPU_ENGINES,
    ENGINES,
    FULL_KEYS,
    NATIVE,
    build,
    grads_of,
    tokens,
)
from tests.memory.oracle import Loops


def cut(monkeypatch, size: int) -> None:
    """Limit chunks, tiles and batches, so that blocks are divided."""
    monkeypatch.setattr(engines, "CACHED_ASSIGNMENTS", size)
    monkeypatch.setattr(tiles, "TILE_ROWS", (size,))
    monkeypatch.setattr(tiled_torch, "ELEMENTS_AT_ONCE", 100 * size)
    monkeypatch.setattr(embedding_bag_kernels, "MASKED_ELEMENTS", 30 * size)


WAYS = [(1, False), (5, True), (5, False), (4096, True)]
"""Sizes of chunks, and whether the losses are computed."""


@pytest.mark.parametrize(
    ("case", "changes", "ways"),
    [
        *((case, {}, WAYS) for case in CASES),
        *((case, {"glu": "silu"}, [(5, True)]) for case in FULL_KEYS),
        *((case, {"glu": "gelu"}, [(4096, False)]) for case in FULL_KEYS),
    ],
)
def test_equals_the_loops(case, changes, ways, monkeypatch):
    """One run of the loops is compared with each engine in several ways."""
    changes = {"gate": "none" if case == "hash_layer" else "sigmoid", **changes}
    memory = build(case, capacity_factor=1.5, **changes)
    loops = Loops(memory, *tokens(8))
    for engine, (size, losses) in product(ENGINES, ways):
        cut(monkeypatch, size)
        one = build(case, capacity_factor=1.5, engine=engine, **changes)
        one.load_state_dict(memory.state_dict())
        loops.assert_equal(one, losses, f"{engine} {size} {losses=}")


@pytest.mark.parametrize("chunk_size", [1, 5, 4096])
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("case", ["avgk-g4", "avgk-g16", "avgk-glu", "switch-top2"])
def test_grouped_equals_loop_in_fp32(case, gate, chunk_size, monkeypatch):
    loop = build(case, torch.float32, engine="loop", gate=gate)
    grouped = build(case, torch.float32, engine="grouped", gate=gate)
    grouped.load_state_dict(loop.state_dict())
    x, token_ids = tokens(24, dtype=torch.float32)
    cotangent = torch.randn(24, 8)
    _, wanted = grads_of(loop, x, token_ids, cotangent)
    cut(monkeypatch, chunk_size)
    _, got = grads_of(grouped, x, token_ids, cotangent)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [5, 4096])
def test_grouped_in_bf16_is_near_fp32(chunk_size, monkeypatch):
    cut(monkeypatch, chunk_size)
    # The token ids choose, so rounding does not choose other blocks.
    narrow = build("hash_layer", torch.bfloat16, engine="grouped")
    wide = build("hash_layer", torch.float32, engine="grouped")
    wide.load_state_dict(narrow.state_dict())
    x, token_ids = tokens(24, dtype=torch.bfloat16)
    cotangent = torch.randn(24, 8)
    _, wanted = grads_of(wide, x.float(), token_ids, cotangent)
    _, got = grads_of(narrow, x, token_ids, cotangent.bfloat16())
    for name in wanted:
        assert got[name].dtype == torch.bfloat16
        error = (got[name].float() - wanted[name]).abs().max()
        assert error <= 0.03 * wanted[name].abs().max(), name


@pytest.mark.parametrize("chunk_size", [1, 5, 4096])
@pytest.mark.parametrize("engine", ["grouped", *CPU_ENGINES])
def test_engines_agree_where_one_block_takes_most(engine, chunk_size, monkeypatch):
    """A block has more assignments than a chunk holds. The first and last blocks have none."""
    blocks_NA = torch.tensor([[3, 1]] * 9 + [[3, 6]] * 4 + [[5, 3]])
    x_ND, cotangent_ND = torch.randn(2, 14, 8)
    tables = [torch.randn(8, 4, 8), torch.randn(8, 4), torch.randn(8, 4, 8)]

    def outcome(name):
        inputs = [t.clone().requires_grad_() for t in (x_ND, *tables, torch.ones(14, 2) / 3)]
        x, keys, bias, values, weights = inputs
        selection = Selection(blocks_NA, weights=weights)
        out = engines.ENGINES[name].compute(
            x, engines.Tables(keys, bias, values), selection, torch.nn.functional.gelu, lambda h: h
        )
        return out, *torch.autograd.grad(out, inputs, cotangent_ND)

    wanted = outcome("loop")
    cut(monkeypatch, chunk_size)
    for got, again, want in zip(outcome(engine), outcome("loop"), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device_type", "dtype", "num_tokens", "active", "table_shape", "name"),
    [
        ("cpu", torch.float32, 2048, 1, (16, 1024, 256), "loop"),
        ("cpu", torch.float64, 2048, 64, (1024, 16, 256), "loop"),
        ("cpu", torch.float32, 2048, 1024, (16384, 1, 256), "embedding_bag"),
        ("cpu", torch.float32, 1, 16, (256, 64, 256), "embedding_bag"),
        ("cpu", torch.float32, 1, 1, (16, 1024, 256), "embedding_bag"),
        ("cpu", torch.float32, 17, 1, (16, 1024, 256), "loop"),
        ("cpu", torch.bfloat16, 2048, 1, (16, 1024, 256), "loop"),
        *(
            ("cuda", dtype, *sizes)
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            for sizes in (
                (8192, 1, (16, 4096, 1024), "tiled"),
                (8192, 64, (1024, 64, 1024), "tiled"),  # the paper's sizes
                (8192, 256, (4096, 16, 1024), "tiled"),
                (1, 64, (1024, 64, 1024), "tiled"),  # one token
                (8192, 1024, (16384, 4, 1024), "masked"),
                (8192, 4096, (65536, 1, 1024), "masked"),
                (8192, 128, (65536, 1, 1024), "embedding_bag"),  # PKM
                (1, 4096, (65536, 1, 1024), "embedding_bag"),
            )
        ),
    ],
)
@pytest.mark.parametrize("native", [pytest.param(True, marks=NATIVE), False])
def test_choice_by_size(
    native, device_type, dtype, num_tokens, active, table_shape, name, monkeypatch
):
    if not native:
        monkeypatch.setattr(kernels, "load", lambda: None)
    elif device_type == "cpu" and dtype != torch.bfloat16:
        name = f"native_{name}"
    chosen = choose_engine(device_type, dtype, num_tokens, active, table_shape)
    assert chosen is engines.ENGINES[name]
    assert chosen.supports(device_type, dtype, table_shape)


@pytest.mark.parametrize("case", CASES)
def test_without_a_compiler(case, monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: None)
    memory = build(case, capacity_factor=1.5)
    loops = Loops(memory, *tokens(8))
    for losses in (True, False):
        loops.assert_equal(memory, losses, f"{losses=}")
    with pytest.raises(ConfigError, match="engine native_embedding_bag: "):
        build(case, engine="native_embedding_bag")


@pytest.mark.parametrize("case", CASES)
def test_on_several_threads(case):
    """Several threads compute what one thread computes, even if there are more threads than blocks
    or tokens."""
    for engine in (None, *ENGINES):
        outcomes = []
        for threads in (1, 5):
            torch.manual_seed(0)
            memory = build(case, engine=engine)
            torch.set_num_threads(threads)
            try:
                x, token_ids = tokens(40)
                outcome = grads_of(memory, x, token_ids, torch.ones(40, 8))[1]
                with torch.no_grad():
                    outcome["one token"] = memory(x[:1], token_ids[:1], losses=False).output
            finally:
                torch.set_num_threads(1)
            outcomes.append(outcome)
        for name, want in outcomes[0].items():
            torch.testing.assert_close(
                outcomes[1][name], want, rtol=1e-10, atol=1e-12, msg=f"{engine} {name}"
            )


@pytest.mark.parametrize("engine", ["grouped", "loop", "tiled"])
def test_half_precision_rounds_a_sum_of_blocks_once(engine):
    """Rounding after each of 64 blocks would enlarge the error. The errors of the output and of the
    gradient of x are near those of a dense FFN."""
    sizes = dict(embed_dim=64, num_cells=1024, block_size=16, active_blocks=64, selector="avgk")
    # Tanh has no kink near which rounding matters.
    config = MemoryConfig(**sizes, engine=engine, activation="tanh")
    memory = SparseMemory(config).bfloat16()
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)

    def outcome(memory, x):
        output = memory(x).output
        return output, *torch.autograd.grad(output.sum(), x)

    exact = copy.deepcopy(memory).double()
    exact.config = dataclasses.replace(memory.config, engine=None)
    want = outcome(exact, x.double().detach().requires_grad_())
    dense = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 64)).bfloat16()
    with torch.no_grad():
        for ours, theirs in zip(memory.parameters(), dense.parameters(), strict=True):
            theirs.copy_(ours.t() if ours is memory.values else ours)
    output = dense(x)
    by_dense = output, *torch.autograd.grad(output.sum(), x)
    for got, near, best in zip(outcome(memory, x), by_dense, want, strict=True):
        errors = [(tensor.double() - best).norm() / best.norm() for tensor in (got, near)]
        assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("engine", ["grouped", "loop", "embedding_bag", "masked", "tiled"])
def test_half_precision_sums_up_the_gradient_of_the_key_bias(engine):
    """The gradient has thousands of addends. Adding one after the other, bfloat16 would lose
    most."""
    memory = build("avgk-g16", torch.float32, engine=engine)
    x = torch.randn(4000, 8) + 0.5
    memory(x).output.sum().backward()
    exact = memory.key_bias.grad.clone()
    memory.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = memory(x).output
    output.float().sum().backward()
    error = (memory.key_bias.grad - exact).norm() / exact.norm()
    assert error < 0.03


@pytest.mark.parametrize("losses", [True, False])
@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("case", ["avgk-g4", "vanilla_m-g1", "vanilla_m-max", "lorkm-g4"])
def test_activations_may_work_in_place(case, engine, losses):
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        memory = build(case, engine=engine, activation=torch.nn.ReLU(inplace))
        x, token_ids = tokens(8)
        results.append(grads_of(memory, x, token_ids, torch.ones(8, 8), losses)[1])
    for got, want in zip(results[1].values(), results[0].values(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_what_is_dropped_counts_nothing_even_where_it_overflows(engine):
    memory = build("switch-top1", engine=engine, activation=torch.exp, capacity_factor=0.1)
    with torch.no_grad():
        memory.keys.mul_(1e4)
    out = memory(tokens(30)[0])
    dropped_N = ~out.selection.kept[:, 0]
    assert dropped_N.sum() >= 20
    assert torch.equal(out.output[dropped_N], memory.value_bias.expand(int(dropped_N.sum()), -1))


@pytest.mark.parametrize("known", ["pre_activations", "coefficients", "weights"])
def test_on_an_accelerator_what_is_dropped_has_no_gradient_even_where_it_overflows(known):
    """Dropped assignments are among the sorted ones, and zero times infinity is NaN."""
    size = 1 if known == "coefficients" else 3
    blocks_NA = torch.tensor([[0, 1], [1, 0], [0, 1]])
    kept_NA = torch.tensor([[True, False], [True, True], [False, True]])
    values_NA = torch.randn(3, 2, *((size,) if known == "pre_activations" else ()))
    values_NA[~kept_NA] = torch.inf
    inputs = [t.requires_grad_() for t in (torch.randn(3, 4), torch.randn(2, size, 4), values_NA)]
    x_ND, table_BGD, values_NA = inputs
    out_ND = engines.ENGINES["tiled"].compute(
        x_ND,
        engines.Tables(table_BGD, None, table_BGD),
        Selection(blocks_NA, kept=kept_NA, **{known: values_NA}),
        torch.exp,
        lambda hidden: hidden,
    )
    grads = torch.autograd.grad(out_ND.sum(), inputs, allow_unused=True)
    for tensor in (out_ND, *(grad for grad in grads if grad is not None)):
        assert tensor.isfinite().all()
    assert not grads[2][~kept_NA].any() and grads[2][kept_NA].all()


@pytest.mark.parametrize("losses", [True, False])
@pytest.mark.parametrize("case", ["avgk-g1", "vanilla_m-g1"])
def test_checkpointing_may_drop_the_index_of_embedding_bags(case, losses):
    memory = build(case, engine="embedding_bag")
    x, token_ids = tokens(8)
    x.requires_grad_()

    def run(x):
        return memory(x, token_ids, losses=losses).output

    want = torch.autograd.grad(run(x).sum(), [x, *memory.parameters()])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x)
    assert any(t.dtype == torch.int64 and t.shape == (8, 6 + 2 * (case == "avgk-g1")) for t in kept)
    out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    grads = torch.autograd.grad(out.sum(), [x, *memory.parameters()])
    for got, wanted in zip(grads, want, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("engine", [None, "grouped", *CPU_ENGINES])
def test_hidden_states_of_any_layout(engine):
    """A convolution returns features first in memory. A slice takes every second token."""
    dtype = torch.float32 if engine == "grouped" else torch.float64
    memory = build("avgk-g4", dtype, engine=engine)
    plain, _ = tokens(40, dtype=dtype)
    cotangent = torch.randn_like(plain)
    want = grads_of(memory, plain, None, cotangent)[1]
    for x in (plain.t().contiguous().t(), plain.repeat_interleave(2, dim=0)[::2]):
        memory.zero_grad()
        x = x.detach().requires_grad_()
        (memory(x).output * cotangent).sum().backward()
        torch.testing.assert_close(x.grad, want["x"])
        torch.testing.assert_close(memory.keys.grad, want["keys"])
        torch.testing.assert_close(memory.values.grad, want["values"])
