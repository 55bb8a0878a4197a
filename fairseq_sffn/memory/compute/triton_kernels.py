"""Products of rows with the tables of their blocks, as kernels in Triton.

Gathering and scattering are part of the products, so that no rows of pairs, (P, D), are formed
(as in ScatterMoE, Tan et al. 2024, arXiv 2403.08245). Products add up in fp32. The tensors are
those of :class:`.tiles.Tiles`; x, tables and rows are contiguous.
"""

# Triton compiles this source: what is annotated is a compile-time constant to it.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "active"])
def gathered_kernel(
    x,
    table,
    bias,
    order,
    starts,
    tiles,
    out,
    num_tiles,
    num_blocks,
    active,
    D: tl.constexpr,
    G: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[p] = x[token of p] @ table[block of p]^T + bias[block of p], of one tile."""
    parts: tl.constexpr = (G + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // parts
    block = tl.load(tiles + tile)
    if block > num_blocks:
        return
    rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, ROWS)
    has_row = rows < tl.load(starts + block + 1)
    cols = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    has_out = has_row[:, None] & (cols < G)[None, :]
    outs = out + rows.to(tl.int64)[:, None] * G + cols[None, :]
    if block == num_blocks:
        tl.store(outs, tl.zeros((ROWS, COLUMNS), out.dtype.element_ty), mask=has_out)
        return
    tokens = (tl.load(order + rows, mask=has_row, other=0) // active).to(tl.int64)
    cells = block.to(tl.int64) * G + cols
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        dims = start + tl.arange(0, DEPTH)
        has_dim = dims < D
        left = tl.load(
            x + tokens[:, None] * D + dims[None, :],
            mask=has_row[:, None] & has_dim[None, :],
            other=0.0,
        )
        right = tl.load(
            table + cells[None, :] * D + dims[:, None],
            mask=(cols < G)[None, :] & has_dim[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + cells, mask=cols < G, other=0.0)[None, :].to(tl.float32)
    tl.store(outs, total.to(out.dtype.element_ty), mask=has_out)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "active"])
def scattered_kernel(
    rows_in,
    table,
    order,
    starts,
    tiles,
    out,
    num_tiles,
    num_blocks,
    active,
    first_column,
    out_width,
    D: tl.constexpr,
    G: tl.constexpr,
    BY_PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[token of p] += rows_in[p] @ table[block of p], of one tile; or, BY_PAIR, out[pair] = the
    same, of ``out_width`` columns from ``first_column`` on."""
    parts = tl.cdiv(out_width, COLUMNS)
    tile = tl.program_id(0) // parts
    block = tl.load(tiles + tile)
    if block >= num_blocks:
        return
    rows = tl.load(tiles + num_tiles + tile) + tl.arange(0, ROWS)
    has_row = rows < tl.load(starts + block + 1)
    out_cols = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    has_col = out_cols < out_width
    cols = first_column + out_cols
    cells = block.to(tl.int64) * G
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, G, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        has_inner = inner < G
        left = tl.load(
            rows_in + rows.to(tl.int64)[:, None] * G + inner[None, :],
            mask=has_row[:, None] & has_inner[None, :],
            other=0.0,
        )
        right = tl.load(
            table + (cells + inner)[:, None] * D + cols[None, :],
            mask=has_inner[:, None] & has_col[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    pairs = tl.load(order + rows, mask=has_row, other=0).to(tl.int64)
    mask = has_row[:, None] & has_col[None, :]
    if BY_PAIR:
        tl.store(out + pairs[:, None] * out_width + out_cols[None, :], total, mask=mask)
    else:
        outs = out + (pairs // active)[:, None] * D + cols[None, :]
        tl.atomic_add(outs, total, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["active"])
def table_kernel(
    rows_in,
    x,
    order,
    starts,
    out,
    sums,
    active,
    D: tl.constexpr,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out[b] = sum of rows_in[p]^T @ x[token of p], and sums[b] = sum of rows_in[p], over the pairs
    p of block b: ROWS of its cells and COLUMNS of the width, DEPTH pairs at a time."""
    wide: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    high: tl.constexpr = (G + ROWS - 1) // ROWS
    program = tl.program_id(0)
    block = (program // (wide * high)).to(tl.int64)
    cells = (program // wide) % high * ROWS + tl.arange(0, ROWS)
    cols = (program % wide) * COLUMNS + tl.arange(0, COLUMNS)
    has_cell, has_col = cells < G, cols < D
    end = tl.load(starts + block + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_rows = tl.zeros((ROWS,), tl.float32)
    for first in range(tl.load(starts + block), end, DEPTH):
        pairs = first + tl.arange(0, DEPTH)
        has_pair = pairs < end
        tokens = (tl.load(order + pairs, mask=has_pair, other=0) // active).to(tl.int64)
        left = tl.load(
            rows_in + pairs.to(tl.int64)[None, :] * G + cells[:, None],
            mask=has_pair[None, :] & has_cell[:, None],
            other=0.0,
        )
        right = tl.load(
            x + tokens[:, None] * D + cols[None, :],
            mask=has_pair[:, None] & has_col[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
        total_rows += tl.sum(left.to(tl.float32), axis=1)
    outs = out + (block * G + cells)[:, None] * D + cols[None, :]
    mask = has_cell[:, None] & has_col[None, :]
    tl.store(outs, total.to(out.dtype.element_ty), mask=mask)
    if program % wide == 0:
        sums_out = total_rows.to(sums.dtype.element_ty)
        tl.store(sums + block * G + cells, sums_out, mask=has_cell)
