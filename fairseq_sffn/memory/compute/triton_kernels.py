"""Products of rows with the tables of their blocks, as Triton kernels.

The kernels gather and scatter the tokens' rows themselves, so that the rows of the assignments,
(P, D), are never formed (as in ScatterMoE, Tan et al. 2024, arXiv 2403.08245). Products accumulate
in fp32. The index tensors are those of :class:`.tiles.Tiles`; x, tables and rows are contiguous.
"""

# Triton compiles this source. An annotated parameter is a compile-time constant; the others must
# not be annotated.
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
    """Compute out[p] = x[token of p] @ table[block of p]^T + bias[block of p] for one tile."""
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
    BY_ASSIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute out[token of p] += rows_in[p] @ table[block of p] for one tile.

    With BY_ASSIGNMENT, the product is written to out[assignment of p]. In both cases ``out`` has
    ``out_width`` columns of the table, starting at ``first_column``.
    """
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
    assignments = tl.load(order + rows, mask=has_row, other=0).to(tl.int64)
    mask = has_row[:, None] & has_col[None, :]
    if BY_ASSIGNMENT:
        tl.store(out + assignments[:, None] * out_width + out_cols[None, :], total, mask=mask)
    else:
        outs = out + (assignments // active)[:, None] * D + cols[None, :]
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
    """Compute out[b] = sum of rows_in[p]^T @ x[token of p] and sums[b] = sum of rows_in[p].

    The sums are over the assignments p of block b, DEPTH at a time. A program computes ROWS cells
    and COLUMNS columns.
    """
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
        within = first + tl.arange(0, DEPTH)
        has_assignment = within < end
        tokens = (tl.load(order + within, mask=has_assignment, other=0) // active).to(tl.int64)
        left = tl.load(
            rows_in + within.to(tl.int64)[None, :] * G + cells[:, None],
            mask=has_assignment[None, :] & has_cell[:, None],
            other=0.0,
        )
        right = tl.load(
            x + tokens[:, None] * D + cols[None, :],
            mask=has_assignment[:, None] & has_col[None, :],
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
