import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fairseq_sffn.memory.compute import tiled_products, tiled_torch
from fairseq_sffn.memory.compute.tiled_products import gathered_products, scattered_products
from tests.memory.compute import loops

OPERATORS = torch.ops.fairseq_sffn


def operands(case, drops=False, block_size=5, width=6, dtype=torch.float64):
    sizes = loops.CASES[case]
    assigned = loops.make_assignments(**sizes, drops=drops)
    num_tokens, num_blocks = sizes["tokens"], sizes["blocks"]
    x_ND = torch.randn(num_tokens, width, dtype=dtype)
    table_BGD = torch.randn(num_blocks, block_size, width, dtype=dtype)
    bias_BG = torch.randn(num_blocks, block_size, dtype=dtype)
    rows_PG = torch.randn(len(assigned.tiles.order_P), block_size, dtype=dtype)
    return assigned, *(t.requires_grad_() for t in (x_ND, table_BGD, bias_BG, rows_PG))


@pytest.mark.parametrize("at_once", [1, 1000, 2**27])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("case", loops.CASES)
def test_products_and_their_gradients_are_those_of_loops(case, drops, at_once, monkeypatch):
    monkeypatch.setattr(tiled_torch, "ELEMENTS_AT_ONCE", at_once)
    assigned, x_ND, table_BGD, bias_BG, rows_PG = operands(case, drops)
    for got, want, inputs in (
        (
            gathered_products(x_ND, table_BGD, bias_BG, assigned.tiles),
            loops.gathered(x_ND, table_BGD, bias_BG, assigned),
            [x_ND, table_BGD, bias_BG],
        ),
        (
            gathered_products(x_ND, table_BGD, None, assigned.tiles),
            loops.gathered(x_ND, table_BGD, None, assigned),
            [x_ND, table_BGD],
        ),
        (
            scattered_products(rows_PG, table_BGD, len(x_ND), assigned.tiles),
            loops.scattered(rows_PG, table_BGD, len(x_ND), assigned),
            [rows_PG, table_BGD],
        ),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        if want.grad_fn is None:  # no tokens
            continue
        cotangent = torch.randn_like(want)
        grads = torch.autograd.grad(got, inputs, cotangent)
        wanted = torch.autograd.grad(want, inputs, cotangent, materialize_grads=True)
        for grad, wanted_grad in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12)
    num_blocks = len(table_BGD)
    got = OPERATORS.table_products(rows_PG, x_ND, *assigned.tiles)
    want = loops.table(rows_PG.detach(), x_ND.detach(), num_blocks, assigned)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("drops", [False, True])
def test_gradients_have_gradients(drops):
    assigned, x_ND, table_BGD, bias_BG, rows_PG = operands("three tokens", drops, 2, 3)

    def gathered(*tensors):
        return gathered_products(*tensors, assigned.tiles)

    def scattered(*tensors):
        return scattered_products(*tensors, len(x_ND), assigned.tiles)

    def table(*tensors):
        return OPERATORS.table_products(*tensors, *assigned.tiles)

    for function, inputs in (
        (gathered, (x_ND, table_BGD, bias_BG)),
        (scattered, (rows_PG, table_BGD)),
        (table, (rows_PG, x_ND)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("case", ["uneven", "no token"])
def test_operators_keep_what_pytorch_asks_of_them(case, drops):
    """``opcheck`` tests fake implementations, registration of gradients, and tracing."""
    assigned, x_ND, table_BGD, bias_BG, rows_PG = operands(case, drops, dtype=torch.float32)
    for name, args in (
        ("gathered_products", (x_ND, table_BGD, bias_BG)),
        ("scattered_products", (rows_PG, table_BGD, len(x_ND))),
        ("table_products", (rows_PG, x_ND)),
    ):
        torch.library.opcheck(getattr(OPERATORS, name).default, (*args, *assigned.tiles))


def test_fake_tensors_and_counters_of_flops_see_them():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        assigned, x_ND, table_BGD, bias_BG, _ = operands("uneven")
        hidden_PG = gathered_products(x_ND, table_BGD, bias_BG, assigned.tiles)
        assert hidden_PG.shape == (111, 5)
        forward = counter.get_total_flops()
        assert forward == 2 * 111 * 5 * 6
        out_ND = scattered_products(hidden_PG, table_BGD, len(x_ND), assigned.tiles)
        assert out_ND.shape == (37, 6)
        out_ND.sum().backward()
    assert x_ND.grad.shape == x_ND.shape and table_BGD.grad.shape == table_BGD.shape
    assert bias_BG.grad.shape == bias_BG.shape
    assert counter.get_total_flops() == 6 * forward


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token(bad):
    assigned, x_ND, table_BGD, bias_BG, rows_PG = operands("uneven")
    want_PG = gathered_products(x_ND, table_BGD, bias_BG, assigned.tiles)
    with torch.no_grad():
        x_ND[3] = bad
    got_PG = gathered_products(x_ND, table_BGD, bias_BG, assigned.tiles)
    others_P = assigned.tiles.order_P // 3 != 3
    assert torch.equal(got_PG[others_P], want_PG[others_P])
    assert not got_PG[~others_P].isfinite().any()
    grad_BGD, _ = OPERATORS.table_products(rows_PG, x_ND, *assigned.tiles)
    used = set(assigned.blocks_NA[3].tolist())
    finite = {block for block in range(7) if grad_BGD[block].isfinite().all()}
    assert finite == set(range(7)) - used


def test_backward_may_run_under_autocast():
    """The operators compute in the dtype of their operands."""
    assigned, x_ND, table_BGD, bias_BG, _ = operands("uneven", dtype=torch.float32)

    def grads(autocast):
        hidden_PG = gathered_products(x_ND, table_BGD, bias_BG, assigned.tiles)
        out_ND = scattered_products(hidden_PG, table_BGD, len(x_ND), assigned.tiles)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(out_ND.sum(), [x_ND, table_BGD, bias_BG])

    for got, want in zip(grads(True), grads(False), strict=True):
        assert torch.equal(got, want)


def test_half_precision_rounds_once():
    """The bias is added before the product is rounded, so that activations near 0 keep their
    sign."""
    assigned, x_ND, table_BGD, bias_BG, _ = operands("uneven", width=64, dtype=torch.bfloat16)
    with torch.no_grad():
        wide = [t.double() for t in (x_ND, table_BGD, bias_BG)]
        product_PG = gathered_products(*wide[:2], None, assigned.tiles)
        # The bias cancels most of the product.
        block_P = assigned.blocks_NA.flatten()[assigned.tiles.order_P]
        first_B = torch.stack([product_PG[block_P == b][0] for b in range(7)])
        bias_BG = (-first_B).bfloat16()
        got_PG = gathered_products(x_ND, table_BGD, bias_BG, assigned.tiles).double()
        want_PG = gathered_products(*wide[:2], bias_BG.double(), assigned.tiles)
    torch.testing.assert_close(got_PG, want_PG, rtol=2**-8, atol=1e-5)


def test_who_computes(monkeypatch):
    """Triton computes on the cards whose matrix units it is written for, if it is installed."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(tiled_products, "_has_triton", lambda: False)
    assert tiled_products.implementation(cuda, torch.bfloat16) is tiled_torch
    monkeypatch.setattr(tiled_products, "_has_triton", lambda: True)
    assert tiled_products.implementation(cpu, torch.bfloat16) is tiled_torch
    assert tiled_products.implementation(cuda, torch.float64) is tiled_torch
    capability[0] = (7, 5)
    assert tiled_products.implementation(cuda, torch.float16) is tiled_torch
    capability[0] = (9, 0)
    tiled_triton = pytest.importorskip("fairseq_sffn.memory.compute.tiled_triton")
    assert tiled_products.implementation(cuda, torch.float16) is tiled_triton


@pytest.mark.parametrize(("switch", "triton"), [("off", False), ("", True)])
def test_kernels_can_be_switched_off(switch, triton, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_SFFN_KERNELS", switch)
    monkeypatch.setattr(tiled_products.importlib.util, "find_spec", lambda name: name)
    tiled_products._has_triton.cache_clear()
    try:
        assert tiled_products._has_triton() == triton
    finally:
        tiled_products._has_triton.cache_clear()
