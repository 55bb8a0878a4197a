import pytest
import torch
from oracle import CASES, assert_matches, build, tokens

from fairseq_sffn.memory.compute import engines

CPU = torch.device("cpu")
ABLE = [
    (name, dtype)
    for name in engines.ENGINES
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if (name, dtype) != ("grouped", torch.float64)
]


def cut(monkeypatch, pairs: int) -> None:
    """Chunks of so few pairs that blocks are split over several."""
    monkeypatch.setattr(engines, "CACHED_PAIRS", pairs)


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


@pytest.mark.parametrize(("name", "dtype"), ABLE)
@pytest.mark.parametrize("ends", [[4, 4, 9], [0, 0, 9], [9, 9, 9], [3, 6, 9]])
def test_products_of_each_group(name, ends, dtype):
    engine = engines.ENGINES[name]
    rows_PX = torch.randn(9, 16, dtype=dtype)
    right_PY = torch.randn(9, 8, dtype=dtype)
    matrices_BXY = torch.randn(3, 16, 8, dtype=dtype)
    ends_B = torch.tensor(ends, dtype=torch.int32)
    wanted_PY = torch.empty_like(right_PY)
    wanted_BXY = torch.empty_like(matrices_BXY)
    start = 0
    for i, end in enumerate(ends):
        wanted_PY[start:end] = rows_PX[start:end] @ matrices_BXY[i]
        wanted_BXY[i] = rows_PX[start:end].t() @ right_PY[start:end]
        start = end
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    options = dict(rtol=tolerance, atol=tolerance)
    transposed_BXY = matrices_BXY.transpose(1, 2).contiguous().transpose(1, 2)
    for given_BXY in (matrices_BXY, transposed_BXY):
        got_PY = engine.rows_by_matrices(rows_PX, given_BXY, ends_B)
        torch.testing.assert_close(got_PY, wanted_PY, **options)
    got_BXY = engine.rows_by_rows(rows_PX, right_PY, ends_B)
    torch.testing.assert_close(got_BXY, wanted_BXY, **options)


@pytest.mark.parametrize(
    ("dtype", "embed_dim", "block_size", "able"),
    [
        (torch.float64, 64, 64, False),
        (torch.float32, 64, 64, True),
        (torch.float32, 64, 1, False),
        (torch.float32, 4, 4, True),
        (torch.float32, 6, 4, False),
        (torch.bfloat16, 8, 8, True),
        (torch.bfloat16, 8, 4, False),
        (torch.bfloat16, 12, 8, False),
    ],
)
def test_what_grouped_supports(dtype, embed_dim, block_size, able):
    assert engines.ENGINES["grouped"].supports(dtype, embed_dim, block_size) == able


@pytest.mark.parametrize(
    ("num_pairs", "dtype", "block_size", "name"),
    [
        (4, torch.float32, 64, "gathered"),
        (64, torch.float32, 64, "gathered"),
        (65, torch.float32, 64, "grouped"),
        (4096, torch.float32, 1, "gathered"),
        (4097, torch.float32, 1, "loop"),
        (65, torch.float64, 64, "loop"),
    ],
)
def test_choice_by_size(num_pairs, dtype, block_size, name):
    chosen = engines.choose_engine(num_pairs, dtype, 64, block_size)
    assert chosen is engines.ENGINES[name]
    assert chosen.supports(dtype, 64, block_size)


@pytest.mark.parametrize("block_size", [1, 64, 10**5])
@pytest.mark.parametrize("name", engines.ENGINES)
def test_chunks_hold_at_least_one_pair(name, block_size):
    assert engines.ENGINES[name].chunk_pairs(CPU, block_size) >= 1
