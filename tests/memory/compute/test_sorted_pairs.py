import itertools

import pytest
import torch

from fairseq_sffn.memory.compute.plan import make_plan
from fairseq_sffn.memory.compute.products import PRODUCTS
from fairseq_sffn.memory.compute.sorted_pairs import combine, score
from tests.memory.oracle import NATIVE


@pytest.mark.parametrize("reduce", ["sum", "columns"])
@pytest.mark.parametrize(
    ("products", "chunk_pairs"),
    [
        *itertools.product(["grouped", "loop"], [5, 100]),
        *(pytest.param("native_loop", pairs, marks=NATIVE) for pairs in (5, 100)),
    ],
)
def test_gradients_may_come_in_any_layout(products, reduce, chunk_pairs):
    """``sum`` sends back an expanded scalar, a transposed product a column-major matrix."""
    blocks_NA = torch.stack([torch.randperm(3)[:2] for _ in range(10)])
    _, plan = make_plan(blocks_NA, 3, chunk_pairs)
    x_ND, keys_BGD, values_BGD = torch.randn(10, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    bias_BG, weights_P = torch.randn(3, 4), torch.rand(20)
    inputs = [t.requires_grad_() for t in (x_ND, keys_BGD, bias_BG, values_BGD, weights_P)]

    pre_PG = score(x_ND, keys_BGD, bias_BG, plan, PRODUCTS[products])
    expected_PG = torch.einsum("pd,pgd->pg", x_ND[plan.tokens], keys_BGD[plan.blocks])
    expected_PG = expected_PG + bias_BG[plan.blocks]
    out_ND = combine(pre_PG, weights_P, values_BGD, plan, 10, PRODUCTS[products])
    rows_PD = torch.einsum("p,pg,pgd->pd", weights_P, expected_PG, values_BGD[plan.blocks])
    expected_ND = torch.zeros(10, 8).index_add(0, plan.tokens, rows_PD)
    torch.testing.assert_close(pre_PG, expected_PG, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out_ND, expected_ND, rtol=1e-4, atol=1e-4)

    def reduced(rows_PX):
        if reduce == "sum":
            return rows_PX.sum()
        return (rows_PX.t() * torch.linspace(0, 1, rows_PX.numel()).view(rows_PX.t().shape)).sum()

    for got_PX, wanted_PX, tensors in (
        (pre_PG, expected_PG, inputs[:3]),
        (out_ND, expected_ND, inputs),
    ):
        for got, wanted in zip(
            torch.autograd.grad(reduced(got_PX), tensors, retain_graph=True),
            torch.autograd.grad(reduced(wanted_PX), tensors, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
