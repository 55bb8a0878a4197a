"""The Triton kernels: their numbers, in Triton's interpreter if there is no GPU, and their
compilation for common cards. All tests need the package triton."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_sffn.memory.compute import tiled_products
from tests.memory.cases import build, grads_of, tokens
from tests.memory.compute import loops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="no package triton: its kernels are not tested",
    ),
]
ROOT = Path(__file__).parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest error relative to the largest number. Products add up in fp32 and are rounded once."""


@pytest.fixture
def triton_products(monkeypatch):
    """Compute the operators with the Triton kernels, and return them."""
    from fairseq_sffn.memory.compute import tiled_triton

    if DEVICE == "cpu":
        import triton
        from triton.runtime import interpreter

        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
            pytest.skip(f"the interpreter of Triton {triton.__version__} fails with NumPy 2.5")

        monkeypatch.setattr(tiled_triton, "_shared_bytes", lambda device: 99 * 1024)
        plain_dot = interpreter.InterpreterBuilder.create_dot

        def dot(self, left, right, *args):
            # The interpreter would multiply the bits of bfloat16 as integers.
            return plain_dot(self, *map(widened, (left, right)), *args)

        def widened(handle):
            if str(handle.dtype.scalar) != "bf16":
                return handle
            wide = (handle.data.astype("uint32") << 16).view("float32")
            return interpreter.TensorHandle(wide, interpreter.tl.float32)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(tiled_products, "implementation", lambda device, dtype: tiled_triton)
    return tiled_triton


def assert_near(got, want, dtype, what=""):
    assert got.dtype == dtype and got.shape == want.shape, what
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], what


@pytest.mark.parametrize(
    ("dtype", "drops"),
    [
        *((torch.float32, False), (torch.float32, True)),
        *((torch.float16, True), (torch.bfloat16, False)),
    ],
)
@pytest.mark.parametrize(
    ("case", "block_size", "width", "rows"),
    [
        ("even", 16, 32, 16),
        *((case, 20, 24, 16) for case in loops.CASES if case != "even"),
        ("uneven", 1, 7, 16),  # smaller than a matrix unit
        ("uneven", 200, 150, 16),  # larger than a program computes
        ("one block has half of all", 70, 140, 32),
        ("one block has half of all", 4, 130, 128),
    ],
)
def test_kernels_compute_what_loops_do(
    case, block_size, width, rows, drops, dtype, triton_products
):
    sizes = loops.CASES[case]
    assigned = loops.make_assignments(**sizes, drops=drops, rows=rows)
    num_tokens, num_blocks = sizes["tokens"], sizes["blocks"]
    num_assignments = len(assigned.tiles.order_P)
    x_ND, table_BGD, bias_BG, rows_PG = (
        torch.randn(shape).to(dtype)
        for shape in (
            (num_tokens, width),
            (num_blocks, block_size, width),
            (num_blocks, block_size),
            (num_assignments, block_size),
        )
    )
    wide = [t.double() for t in (x_ND, table_BGD, bias_BG, rows_PG)]
    here = [t.to(DEVICE) for t in (x_ND, table_BGD, bias_BG, rows_PG)]
    x_ND, table_BGD, bias_BG, rows_PG = here
    tiles = assigned.tiles._replace(
        **{name: getattr(assigned.tiles, name).to(DEVICE) for name in assigned.tiles._fields[:3]}
    )
    for bias in (bias_BG, None):
        got = triton_products.gathered_products(x_ND, table_BGD, bias, tiles)
        wide_bias = None if bias is None else wide[2]
        want = loops.gathered(*wide[:2], wide_bias, assigned)
        assert_near(got.cpu(), want, dtype, "gathered")
    got = triton_products.scattered_products(rows_PG, table_BGD, num_tokens, tiles)
    want = loops.scattered(wide[3], wide[1], num_tokens, assigned)
    assert_near(got.cpu(), want, dtype, "scattered")
    got = triton_products.table_products(rows_PG, x_ND, tiles)
    want = loops.table(wide[3], wide[0], num_blocks, assigned)
    for name, ours, theirs in zip(("table", "sums"), got, want, strict=True):
        assert_near(ours.cpu(), theirs, dtype, name)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("at_once", [1, 37 * 3 * 32, 2**28])
@pytest.mark.parametrize("case", ["uneven", "no token", "one block has half of all"])
def test_reproducible_sums(case, at_once, drops, triton_products, monkeypatch):
    """The sums agree bit for bit in any order of the programs, and for 20 columns at a time as for
    all."""
    monkeypatch.setattr(triton_products, "SCATTERED_ELEMENTS", at_once)
    sizes = loops.CASES[case]
    assigned = loops.make_assignments(**sizes, drops=drops)
    rows_PG = torch.randn(len(assigned.tiles.order_P), 12)
    table_BGD = torch.randn(sizes["blocks"], 12, 50)
    want = loops.scattered(rows_PG.double(), table_BGD.double(), sizes["tokens"], assigned)
    backwards = assigned.tiles._replace(tiles_2T=assigned.tiles.tiles_2T.flip(1).contiguous())
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            triton_products.scattered_products(
                rows_PG.to(DEVICE),
                table_BGD.to(DEVICE),
                sizes["tokens"],
                tiles._replace(
                    **{name: getattr(tiles, name).to(DEVICE) for name in tiles._fields[:3]}
                ),
            ).cpu()
            for tiles in (assigned.tiles, backwards)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert_near(first, want, torch.float32)


def test_sizes_of_a_batch_are_no_constants_of_the_kernels(triton_products):
    """A size that is a constant would compile a kernel for each of its values. With expert
    parallelism, the number of blocks that a token uses on a rank varies."""
    from fairseq_sffn.memory.compute import triton_kernels

    sizes = triton_products.Sizes(16, 24, 40, torch.bfloat16)
    constants = {"ROWS", "COLUMNS", "DEPTH", "D", "G", "PRECISION", "num_warps", "num_stages"}
    for name in ("gathered", "scattered", "table"):
        assert getattr(triton_products, f"{name}_constants")(sizes, 99 * 1024).keys() == constants
        kernel = getattr(triton_kernels, f"{name}_kernel")
        assert "active" in kernel.arg_names and "active" not in kernel.fn.__annotations__


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token(bad, triton_products):
    """This includes the token whose rows are read where a tile has no assignment."""
    assigned = loops.make_assignments(**loops.CASES["uneven"])
    x_ND, table_BGD, rows_PG = torch.randn(37, 8), torch.randn(7, 5, 8), torch.randn(111, 5)
    x_ND[0] = bad
    tiles = assigned.tiles._replace(
        **{name: getattr(assigned.tiles, name).to(DEVICE) for name in assigned.tiles._fields[:3]}
    )
    here = [t.to(DEVICE) for t in (x_ND, table_BGD, rows_PG)]
    gathered_PG = triton_products.gathered_products(*here[:2], None, tiles).cpu()
    assert torch.equal(gathered_PG.isfinite().all(dim=1), assigned.tiles.order_P >= 3)
    grad_BGD, _ = triton_products.table_products(here[2], here[0], tiles)
    finite = {block for block in range(7) if grad_BGD[block].isfinite().all()}
    assert finite == set(range(7)) - set(assigned.blocks_NA[0].tolist())


@pytest.mark.parametrize("losses", [True, False])
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize(
    "case", ["avgk-g1", "avgk-g3", "avgk-g16", "vanilla_m-max", "lorkm-g1", "pkm"]
)
def test_a_memory_by_the_kernels(case, gate, losses, triton_products):
    """Coefficients, pre-activations, weights, capacity and all gradients are compared with fp64."""
    torch.manual_seed(0)
    memory = build(case, torch.float32, gate=gate, capacity_factor=1.5, engine="tiled")
    exact = build(case, torch.float64, gate=gate, capacity_factor=1.5, engine="loop")
    exact.load_state_dict(memory.state_dict())
    x, token_ids = tokens(11)
    x, cotangent = x.float(), torch.randn(11, 8)
    exact_out, want = grads_of(exact, x.double(), token_ids, cotangent.double(), losses)
    out, got = grads_of(
        memory.to(DEVICE), x.to(DEVICE), token_ids.to(DEVICE), cotangent.to(DEVICE), losses
    )
    assert torch.equal(out.selection.blocks.cpu(), exact_out.selection.blocks)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name].cpu().double(), want[name], rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize(
    ("capabilities", "dtype"), [("90 120", "bfloat16"), ("80", "float16"), ("90", "float32")]
)
def test_kernels_compile_for_cards(capabilities, dtype, tmp_path):
    """The kernels use each card's matrix instructions, and fit into its shared memory. Triton keeps
    what it compiled under a name with the fingerprint of its source, for the validation kit too."""
    script = ROOT / "examples" / "gpu" / "compile_kernels.py"
    command = [sys.executable, script, "--capabilities", *capabilities.split(), "--dtypes", dtype]
    made = tmp_path / "made.json"
    done = subprocess.run([*command, "--json", made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(made.read_text())
    assert len(rows) == len(capabilities.split()) * 5 * 4
    for row in rows:
        assert row["shared_bytes"] <= row["allowed_bytes"]
        if row["dtype"] != "fp32":  # fp32 stays exact, without TF32
            assert row["matrix_unit"] != "none", row
        if row["kernel"] == "scattered" and row["capability"] >= 90:
            assert row["wide_atomics"], row
    large = [row for row in rows if row["capability"] == 90 and row["block_size"] == 4096]
    if dtype != "float32":
        assert all(row["matrix_unit"] == "wgmma.mma_async" for row in large)
