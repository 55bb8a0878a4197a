"""Compile the kernels in Triton for cards, without a GPU.

    python examples/gpu/compile_kernels.py [--capabilities 80 90 120] [--json FILE]

Prints a line for each kernel: the shared memory of a program, the instructions of its matrix
products, and whether it fits the card. Needs the package triton. The exit status is 1 if a kernel
does not compile or fit.
"""

import argparse
import json
import os
import sys
from typing import Any

SHARED_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
"""Compute capability -> shared memory that a program may have (CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability")."""

SIZES = ((4096, 128), (64, 128), (64, 16), (24, 32), (16, 128))
"""Pairs of block size (cells) and tile size (rows)."""

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
WIDTH = 1024
KERNELS = ("gathered", "scattered", "scattered by assignment", "table")


def compiled(
    kernel: str, block_size: int, rows: int, dtype: Any, capability: int
) -> dict[str, Any]:
    """Compile one kernel and return a row about it."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fairseq_sffn.memory.compute import tiled_triton, triton_kernels

    name = kernel.partition(" ")[0]
    function = getattr(triton_kernels, f"{name}_kernel")
    sizes = tiled_triton.Sizes(rows, block_size, WIDTH, dtype)
    constants = getattr(tiled_triton, f"{name}_constants")(sizes, SHARED_BYTES[capability])
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"HAS_BIAS": True} if name == "gathered" else {}
    constants |= (
        {"BY_ASSIGNMENT": kernel == "scattered by assignment"} if name == "scattered" else {}
    )
    number = DTYPES[str(dtype).removeprefix("torch.")]
    kinds = dict.fromkeys(("order", "starts", "tiles"), "*i32")
    kinds |= dict.fromkeys(
        ("num_tiles", "num_blocks", "active", "first_column", "out_width"), "i32"
    )
    kinds |= {"out": "*fp32"} if name == "scattered" else {}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, f"*{number}") for name in function.arg_names}
    # Allocations of PyTorch have this alignment, and sizes are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("first_column", "out_width")
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    result = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = result.asm["ptx"]
    units = [unit for unit in ("wgmma.mma_async", "mma.sync", "tcgen05.mma") if unit in ptx]
    return {
        "kernel": kernel,
        "capability": capability,
        "block_size": block_size,
        "rows": rows,
        "dtype": number,
        "shared_bytes": result.metadata.shared,
        "allowed_bytes": SHARED_BYTES[capability],
        "stages": options["num_stages"],
        "warps": options["num_warps"],
        "matrix_unit": units[0] if units else "none",
        "wide_atomics": name == "scattered" and ".v4.f32" in ptx,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = sorted(SHARED_BYTES)
    parser.add_argument("--capabilities", nargs="+", type=int, default=known, choices=known)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--json", metavar="FILE", help="also write the lines there")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    rows, failed = [], 0
    for capability in args.capabilities:
        for dtype in args.dtypes:
            for block_size, tile_rows in SIZES:
                for kernel in KERNELS:
                    where = f"sm_{capability} {dtype} g={block_size} {kernel}"
                    try:
                        row = compiled(
                            kernel, block_size, tile_rows, getattr(torch, dtype), capability
                        )
                    except Exception as error:
                        failed += 1
                        print(f"{where}: {type(error).__name__}: {error}", file=sys.stderr)
                        continue
                    fits = row["shared_bytes"] <= row["allowed_bytes"]
                    failed += not fits
                    rows.append(row)
                    print(
                        f"{where}: {row['shared_bytes']} of {row['allowed_bytes']} bytes, "
                        f"{row['matrix_unit']}{'' if fits else ', DOES NOT FIT'}",
                        flush=True,
                    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    print(f"{len(rows)} kernels compiled, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
