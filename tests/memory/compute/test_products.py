import pytest
import torch

from fairseq_sffn.memory.compute import products

CPU = torch.device("cpu")
ABLE = [
    (name, dtype)
    for name in products.PRODUCTS
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if (name, dtype) != ("grouped", torch.float64)
]


@pytest.mark.parametrize(("name", "dtype"), ABLE)
@pytest.mark.parametrize("ends", [[4, 4, 9], [0, 0, 9], [9, 9, 9], [3, 6, 9]])
def test_products_of_each_group(name, ends, dtype):
    engine = products.PRODUCTS[name]
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
    assert products.PRODUCTS["grouped"].supports(dtype, embed_dim, block_size) == able


@pytest.mark.parametrize("block_size", [1, 64, 10**5])
@pytest.mark.parametrize("name", products.PRODUCTS)
def test_chunks_hold_at_least_one_pair(name, block_size):
    assert products.PRODUCTS[name].chunk_pairs(CPU, block_size) >= 1
