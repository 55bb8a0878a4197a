from itertools import pairwise

import pytest
import torch

from fairseq_sffn.memory.compute.chunks import Chunk
from fairseq_sffn.memory.compute.grouped_mm import GROUPED_MMS
from tests.memory.cases import NATIVE

FLOATS = (torch.float64, torch.float32, torch.bfloat16)
ABLE = [
    *(("loop", dtype) for dtype in FLOATS),
    *(("grouped", dtype) for dtype in FLOATS[1:]),
    *(pytest.param("native_loop", dtype, marks=NATIVE) for dtype in FLOATS[:2]),
]


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "dtype"), ABLE)
@pytest.mark.parametrize("ends", [[4, 4, 9], [1, 1, 9], [9, 9, 9], [3, 6, 9]])
def test_products_of_each_block(name, ends, bias, continues, dtype):
    mm = GROUPED_MMS[name]
    rows_PX = torch.randn(9, 16, dtype=dtype)
    right_PY = torch.randn(9, 8, dtype=dtype)
    matrices_BXY = torch.randn(5, 16, 8, dtype=dtype)
    bias_BY = torch.randn(5, 8, dtype=dtype) if bias else None
    sizes = [end - start for start, end in pairwise([0, *ends])]
    ends_B = torch.tensor(ends, dtype=torch.int32)
    chunk = Chunk(slice(20, 29), slice(1, 4), ends_B, sizes, continues)
    before_BXY = torch.randn_like(matrices_BXY)
    wanted_PY, wanted_BXY = torch.empty_like(right_PY), before_BXY.clone()
    start = 0
    for i, end in enumerate(ends, 1):
        wanted_PY[start:end] = rows_PX[start:end] @ matrices_BXY[i]
        if bias:
            wanted_PY[start:end] += bias_BY[i]
        wanted_BXY[i] = rows_PX[start:end].t() @ right_PY[start:end]
        start = end
    if continues:
        wanted_BXY[1] += before_BXY[1]
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    options = dict(rtol=tolerance, atol=tolerance)
    transposed_BXY = matrices_BXY.transpose(1, 2).contiguous().transpose(1, 2)
    for given_BXY in (matrices_BXY, transposed_BXY):
        got_PY = torch.full_like(wanted_PY, torch.nan)
        mm.grouped_mm(rows_PX, given_BXY, chunk, got_PY, bias_BY)
        torch.testing.assert_close(got_PY, wanted_PY, **options)
    got_BXY = before_BXY.clone()
    mm.grouped_mm_transposed(rows_PX, right_PY, chunk, got_BXY)
    torch.testing.assert_close(got_BXY, wanted_BXY, **options)


@pytest.mark.parametrize(
    ("device", "dtype", "table_shape", "able"),
    [
        ("cpu", torch.float64, (9, 64, 64), False),
        ("cpu", torch.float32, (9, 64, 64), True),
        ("cpu", torch.float32, (9, 1, 64), False),
        ("cpu", torch.float32, (9, 4, 4), True),
        ("cpu", torch.float32, (9, 4, 6), False),
        ("cpu", torch.bfloat16, (9, 8, 8), True),
        ("cpu", torch.bfloat16, (9, 4, 8), False),
        ("cpu", torch.bfloat16, (9, 8, 12), False),
        ("cpu", torch.bfloat16, (4096, 8, 8), True),
        ("cuda", torch.bfloat16, (1023, 8, 8), True),
        ("cuda", torch.bfloat16, (1024, 8, 8), False),  # refused by grouped_mm
    ],
)
def test_what_grouped_supports(device, dtype, table_shape, able):
    assert GROUPED_MMS["grouped"].supports(device, dtype, table_shape) == able


@pytest.mark.parametrize(("name", "dtype"), ABLE)
def test_rows_are_added(name, dtype):
    tokens_P = torch.tensor([2, 0, 2, 2, 5], dtype=torch.int32)
    rows_PD = torch.randn(5, 70, dtype=dtype)
    got_ND, wanted_ND = torch.ones(2, 6, 70, dtype=dtype)
    for token, row in zip(tokens_P, rows_PD, strict=True):
        wanted_ND[token] += row
    GROUPED_MMS[name].add_rows(got_ND, tokens_P, rows_PD)
    torch.testing.assert_close(got_ND, wanted_ND)
