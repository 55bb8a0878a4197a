"""Plans a training on 8 to 4,096 GPUs, and writes a table and a figure.

Nothing is measured here: all numbers follow from sizes, and from the speeds in ``Machine``. They
are those of ``fairseq-sffn plan``, for an update of several micro-batches.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2])]
from fairseq_sffn import plugin  # noqa: E402, F401
from fairseq_sffn.tools.language_model import build_language_model  # noqa: E402
from fairseq_sffn.tools.plan import Setting, plan_figures  # noqa: E402

GPUS = (8, 64, 512, 4096)
SHARDS = (1, 8, 64)
METHODS = ("avgk", "switch")
TENFOLD = (
    *("--decoder-embed-dim", "3072", "--decoder-ffn-embed-dim", "12288"),
    *("--decoder-attention-heads", "24", "--decoder-layers", "30", "--checkpoint-activations"),
)
SIZES = {"gpt3_medium": ((), "bf16"), "ten times": (TENFOLD, "memory_efficient_bf16")}
"""Name of a size -> flags that differ from ``*_gpt3_medium``, and the precision."""
VOCABULARY, CONTEXT = 51200, 2048
UPDATE_TOKENS = 2**22
"""Tokens of an update. With more GPUs than it has sequences, each has one sequence."""
MICRO_BATCH_TOKENS = 4096
"""Largest number of tokens of a micro-batch on a GPU."""
HEADER = (
    *("size", "method", "GPUs", "M", "GB per GPU", "GB inside", "GB between", "share"),
    *("tokens/s per GPU", "checkpoint GB", "seconds to save"),
)


@dataclass(frozen=True)
class Machine:
    """The assumptions.

    Attributes:
        gpus_per_node: GPUs of a node.
        memory: GB of a GPU.
        flops: TFLOP/s that a GPU achieves in bf16: 40% of an H100's 989.
        node_bandwidth: GB/s that a GPU sends within its node: two thirds of NVLink's 450.
        bandwidth: GB/s that a GPU sends to other nodes: 80% of a 400 Gbit/s adapter for each GPU.
        disk, disks: GB/s that a process writes to the shared file system, and that all write.
    """

    gpus_per_node: int = 8
    memory: float = 80.0
    flops: float = 400.0
    node_bandwidth: float = 300.0
    bandwidth: float = 40.0
    disk: float = 2.0
    disks: float = 100.0


class Row(NamedTuple):
    """A plan of one training.

    Attributes:
        size, method: the model.
        gpus, shards: GPUs, and GPUs over which the blocks are sharded (M).
        memory: GB of a GPU.
        inside, between: GB that a GPU sends in an update, within its node and to other nodes.
        share: share of communication in the time of an update.
        speed: tokens per second of a GPU.
        checkpoint, saving: GB of a checkpoint, and seconds to write it.
    """

    size: str
    method: str
    gpus: int
    shards: int
    memory: float
    inside: float
    between: float
    share: float
    speed: float
    checkpoint: float
    saving: float


def plan_row(size: str, method: str, model: Any, gpus: int, shards: int, machine: Machine) -> Row:
    """Return the plan of an update.

    Sparse layers send in each micro-batch. Gradients are sent once in an update.

    Args:
        size: a key of ``SIZES``, which gives the precision.
        method, model: name of the method, and the model.
        gpus, shards: GPUs, and GPUs over which the blocks are sharded.
        machine: the assumptions.
    """
    tokens = max(UPDATE_TOKENS // gpus, CONTEXT)
    micro = min(tokens, MICRO_BATCH_TOKENS)
    setting = Setting(
        **dict(world_size=gpus, sffn_expert_parallel=shards, tokens_per_rank=micro),
        **dict(tokens_per_sample=CONTEXT, precision=SIZES[size][1], flops=machine.flops),
        **dict(bandwidth=machine.bandwidth, node_bandwidth=machine.node_bandwidth),
        ranks_per_node=machine.gpus_per_node,
    )
    figures = plan_figures(model, setting)
    batches = tokens // micro
    times = {name: 1 if name.endswith("gradients") else batches for name in figures["sent_seconds"]}

    def of_an_update(key: str) -> float:
        return float(sum(figures[key][name] * count for name, count in times.items()))

    sent, between = of_an_update("sent"), of_an_update("sent_between_nodes")
    communication, compute = of_an_update("sent_seconds"), batches * figures["compute_seconds"]
    checkpoint = figures["checkpoint"]
    part_speed = min(machine.disk, machine.disks / shards)
    saving = checkpoint["part"] / part_speed + checkpoint["file"] / machine.disk
    return Row(
        *(size, method, gpus, shards, figures["memory"]["total"] / 1e9),
        *((sent - between) / 1e9, between / 1e9),
        *(communication / (communication + compute), tokens / (communication + compute)),
        *(checkpoint["all"] / 1e9, saving / 1e9),
    )


def plan_rows(machine: Machine) -> list[Row]:
    """Return the plans of all trainings."""
    rows = []
    for size, (flags, _) in SIZES.items():
        for method in METHODS:
            arch = f"transformer_lm_{method}_gpt3_medium"
            model = build_language_model(arch, VOCABULARY, CONTEXT, flags)
            rows += [
                plan_row(size, method, model, gpus, shards, machine)
                for gpus in GPUS
                for shards in SHARDS
                if shards <= gpus and can_be_sharded(model, shards)
            ]
    return rows


def can_be_sharded(model: Any, shards: int) -> bool:
    """Return whether each rank gets a block of every sparse layer."""
    return all(config.num_blocks % shards == 0 for config in model.memory_configs.values())


def table(rows: list[Row], machine: Machine) -> str:
    """Return a Markdown table. An asterisk marks what does not fit into a GPU's memory."""
    lines = ["| " + " | ".join(HEADER) + " |", "| " + " | ".join(["---"] * len(HEADER)) + " |"]
    for row in rows:
        cells = (
            *(row.size, row.method, f"{row.gpus:,}", f"{row.shards}"),
            f"{row.memory:.1f}{'*' if row.memory > machine.memory else ''}",
            *(f"{row.inside:.2f}", f"{row.between:.2f}", f"{row.share:.1%}", f"{row.speed:,.0f}"),
            *(f"{row.checkpoint:.1f}", f"{row.saving:.1f}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def figure(rows: list[Row], machine: Machine) -> bytes:
    """Return a PNG with the speed of a GPU. Hollow points do not fit into its memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, len(SIZES), figsize=(9, 3.6), constrained_layout=True)
    colors = dict(zip(SHARDS, ("#000000", "#0072B2", "#D55E00"), strict=True))
    styles = dict(zip(METHODS, ("-", "--"), strict=True))
    for plot, size in zip(axes, SIZES, strict=True):
        for method in METHODS:
            for shards in SHARDS:
                of = [r for r in rows if r[:2] == (size, method) and r.shards == shards]
                if not of:
                    continue
                x, y = [r.gpus for r in of], [r.speed / 1e3 for r in of]
                label = f"{method}, M = {shards}"
                plot.plot(x, y, styles[method], color=colors[shards], label=label)
                for r in of:
                    face = "white" if r.memory > machine.memory else colors[shards]
                    plot.plot(r.gpus, r.speed / 1e3, "o", color=colors[shards], mfc=face)
        plot.set(xscale="log", xticks=GPUS, xlabel="GPUs", title=size, ylim=(0, None))
        plot.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        plot.minorticks_off()
        plot.grid(alpha=0.3)
    axes[0].set_ylabel("thousand tokens/s per GPU")
    axes[0].legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(drawn)
    return out.getvalue()


def main(arguments: list[str] | None = None) -> None:
    """Write ``table.md`` and ``figure.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the table and the figure")
    for name, value in vars(Machine()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    folder, machine = options.pop("folder"), Machine(**options)
    rows = plan_rows(machine)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(rows, machine))
    (folder / "figure.png").write_bytes(figure(rows, machine))


if __name__ == "__main__":
    main()
