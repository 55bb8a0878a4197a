import itertools

import pytest
import torch

from fairseq_sffn.memory.compute.chunks import chunk_assignments
from fairseq_sffn.memory.compute.grouped_mm import GROUPED_MMS
from fairseq_sffn.memory.compute.sorted_assignments import pre_activations, sum_values
from tests.memory.cases import NATIVE


@pytest.mark.parametrize("reduce", ["sum", "columns"])
@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [
        *itertools.product(["grouped", "loop"], [5, 100]),
        *(pytest.param("native_loop", size, marks=NATIVE) for size in (5, 100)),
    ],
)
def test_gradients_may_come_in_any_layout(name, reduce, chunk_size):
    """The gradient of ``sum`` is an expanded scalar. The gradient of a transposed product is
    column-major."""
    blocks_NA = torch.stack([torch.randperm(3)[:2] for _ in range(10)])
    _, chunked = chunk_assignments(blocks_NA, 3, chunk_size)
    x_ND, keys_BGD, values_BGD = torch.randn(10, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    bias_BG, weights_P = torch.randn(3, 4), torch.rand(20)
    inputs = [t.requires_grad_() for t in (x_ND, keys_BGD, bias_BG, values_BGD, weights_P)]

    (pre_PG,) = pre_activations(x_ND, [(keys_BGD, bias_BG)], chunked, GROUPED_MMS[name])
    expected_PG = torch.einsum("pd,pgd->pg", x_ND[chunked.tokens], keys_BGD[chunked.blocks])
    expected_PG = expected_PG + bias_BG[chunked.blocks]
    out_ND = sum_values(pre_PG, weights_P, values_BGD, chunked, 10, GROUPED_MMS[name])
    rows_PD = torch.einsum("p,pg,pgd->pd", weights_P, expected_PG, values_BGD[chunked.blocks])
    expected_ND = torch.zeros(10, 8).index_add(0, chunked.tokens, rows_PD)
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
