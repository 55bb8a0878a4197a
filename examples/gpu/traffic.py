"""Counts the bytes that a sparse layer moves on a GPU, and the kernels that it starts.

    python examples/gpu/traffic.py [--json FILE]

The operations run over CUDA tensors without numbers (see ``fake_cuda.py``), on any machine: forward
and backward with selection, in bf16, of a layer with 8,192 tokens, width 1,024 and 65,536 cells, of
which each token uses 4,096. The bytes are the operands of all kernels, each once. They are compared
with a floor for layers that gather rows: x, the output, the tables and all their gradients once;
the hidden activations twice; and for each assignment (token, block) two gathered rows and two added
rows. Times are not measured.
"""

import argparse
import json
import sys

import fake_cuda
import recorder

ROWS = (
    ("Avg-K, g = 4,096", "avgk", 4096),
    ("Avg-K, g = 256", "avgk", 256),
    ("Avg-K, g = 64", "avgk", 64),
    ("Avg-K, g = 16", "avgk", 16),
    ("VanillaM, g = 1", "vanilla_m", 1),
)


def floor_bytes(block_size: int) -> int:
    """Return the least number of bytes that a layer moves if it gathers rows."""
    sizes, itemsize = fake_cuda.SIZES["paper"], 2
    tokens, width, active = sizes["tokens"], sizes["embed_dim"], sizes["ffn_embed_dim"]
    cells = fake_cuda.EXPANSION * active
    assignments = tokens * max(1, active // block_size)
    outside = 4 * tokens * width
    tables = 4 * cells * width
    hidden = 2 * 2 * tokens * active
    gathered = 4 * assignments * width
    return itemsize * (outside + tables + hidden + gathered)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    recorder.run_with_guard(sys.argv)
    rows = []
    for name, selector, block_size in ROWS:
        case = fake_cuda.Case("paper", selector, block_size, "bf16", losses=False)
        outcome = fake_cuda.run(case)
        if outcome.problems:
            print("\n".join(outcome.problems), file=sys.stderr)
            recorder.leave(1)
        floor = floor_bytes(block_size)
        rows.append(
            {"layer": name, "kernels": outcome.launches, "bytes": outcome.bytes, "floor": floor}
        )
    print("| layer | kernels | GB moved | floor, GB | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        moved, floor = row["bytes"], row["floor"]
        print(
            f"| {row['layer']} | {row['kernels']} | {moved / 1e9:.1f} | {floor / 1e9:.1f} | "
            f"{moved / floor:.2f} |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    recorder.leave(0)


if __name__ == "__main__":
    main()
