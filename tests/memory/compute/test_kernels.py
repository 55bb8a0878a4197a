"""The operators of the C++ kernels. The tests of the engines check what memories compute with
them."""

import pytest
import torch

from fairseq_sffn.memory.compute import kernels
from fairseq_sffn.memory.compute.embedding_bag_kernels import RowOrder
from tests.memory.cases import NATIVE


@NATIVE
@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_that_is_not_there(block):
    blocks_NA, table_BGD = torch.tensor([[0, block]]), torch.ones(3, 2, 4)
    ops = kernels.load()
    with pytest.raises(IndexError, match=f"block {block} of 3"):
        ops.dots(torch.ones(1, 4), table_BGD, None, blocks_NA)
    with pytest.raises(IndexError, match=f"block {block} of 3"):
        ops.sums(torch.ones(1, 4), table_BGD, blocks_NA)


@NATIVE
def test_rows_of_weight_zero_are_skipped():
    table_BGD = torch.full((2, 3, 4), torch.nan)
    table_BGD[1, 1] = 2.0
    weights_NK = torch.tensor([[0.0, 0.0, 0.0, 0.0, 3.0, 0.0]])
    sums_ND = kernels.load().sums(weights_NK, table_BGD, torch.tensor([[0, 1]]))
    assert torch.equal(sums_ND, torch.full((1, 4), 6.0))


@NATIVE
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 64, 700])
@pytest.mark.parametrize("cells", [1, 5, 100])
def test_embedding_bags_of_any_layout(cells, width, dtype, threads):
    """Widths and counts are no multiples of a vector. Operands are transposed, and tokens are
    few."""
    blocks_NA = torch.tensor([[2, 0], [3, 3], [0, 1]]).t().contiguous().t()
    x_ND = torch.randn(width, 3, dtype=dtype).t()
    table_BGD = torch.randn(4, width, cells, dtype=dtype).transpose(1, 2)
    bias_BG = torch.randn(cells, 4, dtype=dtype).t()
    weights_NAG = torch.randn(3, 2, cells, dtype=dtype).relu()
    rows_NAGD = table_BGD[blocks_NA]
    wanted_dots = torch.einsum("nd,nagd->nag", x_ND, rows_NAGD) + bias_BG[blocks_NA]
    wanted_sums = torch.einsum("nag,nagd->nd", weights_NAG, rows_NAGD)
    ops, weights_NK = kernels.load(), weights_NAG.flatten(1).t().contiguous().t()
    torch.set_num_threads(threads)
    try:
        for n in (1, 3):
            dots = ops.dots(x_ND[:n], table_BGD, bias_BG, blocks_NA[:n])
            sums = ops.sums(weights_NK[:n], table_BGD, blocks_NA[:n])
            torch.testing.assert_close(dots, wanted_dots[:n].flatten(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sums, wanted_sums[:n], rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(1)


@NATIVE
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_products_that_threads_share(threads):
    """The operands are large enough to be cut: rows within blocks, tall products, columns."""
    sizes = [0, 300, 1, 0, 211]
    ends_B = torch.tensor(sizes).cumsum(0).int()
    rows_PX, right_PY = torch.randn(512, 150).double(), torch.randn(512, 700).double()
    matrices_BXY, bias_BY = torch.randn(5, 150, 700).double(), torch.randn(5, 700).double()
    out_PY, out_BXY = torch.full((512, 700), 7.0).double(), torch.full((5, 150, 700), 7.0).double()
    sums_ND, tokens_P = torch.ones(9, 700).double(), torch.randint(9, (512,), dtype=torch.int32)
    torch.set_num_threads(threads)
    try:
        ops = kernels.load()
        ops.grouped_mm(rows_PX, matrices_BXY, ends_B, out_PY, bias_BY)
        ops.grouped_mm_transposed(rows_PX, right_PY, ends_B, out_BXY, False)
        ops.add_rows(sums_ND, tokens_P, right_PY)
    finally:
        torch.set_num_threads(1)
    blocks_P = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    wanted_PY = torch.stack(
        [r @ matrices_BXY[b] + bias_BY[b] for r, b in zip(rows_PX, blocks_P, strict=True)]
    )
    torch.testing.assert_close(out_PY, wanted_PY)
    parts = zip(rows_PX.split(sizes), right_PY.split(sizes), strict=True)
    torch.testing.assert_close(out_BXY, torch.stack([left.t() @ right for left, right in parts]))
    wanted_ND = torch.ones(9, 700).double()
    for token, row in zip(tokens_P, right_PY, strict=True):
        wanted_ND[token] += row
    torch.testing.assert_close(sums_ND, wanted_ND)


@NATIVE
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cells", [1, 3])
@pytest.mark.parametrize("num_tokens", [0, 5, 2050, 2501])  # 2,048 of them are four tiles
def test_sums_of_more_tokens_than_a_core_keeps(num_tokens, cells, threads):
    """One block has no token, one has few, and most tokens use another one."""
    x_ND = torch.randn(num_tokens, 64).double()
    blocks_NA = torch.rand(num_tokens, 12).argsort(dim=1)[:, :4]
    blocks_NA[:, 0] = 12
    blocks_NA[3:5, 1] = 13
    weights_NK = torch.randn(num_tokens, 4 * cells).double().relu()
    order = RowOrder().of(blocks_NA, 15)
    torch.set_num_threads(threads)
    try:
        sums_BGD = kernels.load().table_sums(weights_NK, x_ND, *order, cells)
    finally:
        torch.set_num_threads(1)
    wanted_BGD = torch.zeros(15, cells, 64).double()
    outer_NAGD = weights_NK.view(num_tokens, 4, cells, 1) * x_ND.view(num_tokens, 1, 1, 64)
    for block in range(15):
        wanted_BGD[block] = outer_NAGD[blocks_NA == block].sum(dim=0)
    torch.testing.assert_close(sums_BGD, wanted_BGD)
