import pytest
import torch
from oracle import CASES, assert_matches, build, tokens

from fairseq_sffn.memory.compute import engines, products


def cut(monkeypatch, pairs: int) -> None:
    """Chunks of so few pairs that blocks are split over several."""
    monkeypatch.setattr(products, "CACHED_PAIRS", pairs)


@pytest.mark.parametrize("cached_pairs", [1, 5, 7, 4096])
@pytest.mark.parametrize("engine", ["loop", "gathered"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loops(case, engine, cached_pairs, monkeypatch):
    cut(monkeypatch, cached_pairs)
    gate = "none" if case == "hash_layer" else "sigmoid"
    memory = build(case, engine=engine, gate=gate, capacity_factor=1.5)
    assert_matches(memory, *tokens(8))


@pytest.mark.parametrize("cached_pairs", [3, 16, 4096])
def test_gathered_in_chunks_of_many_pairs(cached_pairs, monkeypatch):
    cut(monkeypatch, 4 * cached_pairs)  # times the block size, so that a chunk has so many pairs
    assert_matches(build(engine="gathered"), *tokens(8))


def grads_of(memory, x, token_ids, cotangent):
    x = x.clone().requires_grad_()
    out = memory(x, token_ids)
    (out.output * cotangent).sum().backward()
    grads = {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}
    return out, {"output": out.output, "x": x.grad, **grads}


@pytest.mark.parametrize("cached_pairs", [1, 5, 4096])
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("case", ["avgk-g4", "avgk-g16", "switch-top2"])
def test_grouped_equals_loop_in_fp32(case, gate, cached_pairs, monkeypatch):
    loop = build(case, torch.float32, engine="loop", gate=gate)
    grouped = build(case, torch.float32, engine="grouped", gate=gate)
    grouped.load_state_dict(loop.state_dict())
    x, token_ids = tokens(24, dtype=torch.float32)
    cotangent = torch.randn(24, 8)
    _, wanted = grads_of(loop, x, token_ids, cotangent)
    cut(monkeypatch, cached_pairs)
    _, got = grads_of(grouped, x, token_ids, cotangent)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached_pairs", [5, 4096])
def test_grouped_in_bf16_is_near_fp32(cached_pairs, monkeypatch):
    cut(monkeypatch, cached_pairs)
    # The token ids choose, so that rounding does not choose other blocks.
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


@pytest.mark.parametrize(
    ("num_pairs", "dtype", "block_size", "name"),
    [
        (4, torch.float32, 64, "gathered"),
        (64, torch.float32, 64, "gathered"),
        (65, torch.float32, 64, "grouped"),
        (1, torch.float32, 1, "bags"),
        (4097, torch.float64, 1, "bags"),
        (65, torch.float64, 64, "loop"),
    ],
)
def test_choice_by_size(num_pairs, dtype, block_size, name):
    chosen = engines.choose_engine(num_pairs, dtype, 64, block_size)
    assert chosen is engines.ENGINES[name]
    assert chosen.supports(dtype, 64, block_size)
