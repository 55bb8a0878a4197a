"""Run sparse layers and a training step over CUDA tensors without numbers, on any machine.

    python examples/gpu/fake_cuda.py [--quick] [--json FILE]

Finds code that would fail on a GPU or make the host wait for it: operands on two devices, values
that the host reads, products that a GPU refuses or computes block by block. Prints the number of
kernels that a layer starts and the bytes it moves. Neither numbers nor times are checked. Needs a
C++ compiler. The exit status is 1 if something is found.
"""

import argparse
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import fake_step
import recorder
import torch
from recorder import KINDS, WAITS_OF, Outcome

from fairseq_sffn.memory import MemoryConfig, SparseMemory
from fairseq_sffn.memory.gate import GATES
from fairseq_sffn.memory.selection import Selector

SIZES = {
    "toy": dict(embed_dim=64, ffn_embed_dim=256, tokens=32),
    "paper": dict(embed_dim=1024, ffn_embed_dim=4096, tokens=8192),
}
EXPANSION = 16
BLOCK_SIZES = (1, 4, 16, 64, 256)
QUICK_KINDS = ("bf16", "autocast bf16")
"""Precisions of the small layers with ``--quick``."""
MOST_LAUNCHES = 250
"""Largest number of kernels of a layer, forward and backward, with losses and statistics. More
would mean a kernel for each block or chunk."""


@dataclass
class Case:
    """A layer and how it is used."""

    size: str
    selector: str
    block_size: int
    kind: str
    gate: str | None = None
    padding: bool = False
    capacity: float = 0.0
    training: bool = True
    losses: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    glu: str | None = None
    shared: int = 0

    def __str__(self) -> str:
        words = [self.size, self.selector, f"g={self.block_size}", self.kind]
        words += [f"gate={self.gate}"] if self.gate else []
        words += [f"{name}={value}" for name, value in self.options.items()]
        words += [f"glu={self.glu}"] if self.glu else []
        words += [f"shared={self.shared}"] if self.shared else []
        words += ["padding"] * self.padding + ["capacity"] * bool(self.capacity)
        words += ["evaluation"] * (not self.training) + ["without losses"] * (not self.losses)
        return " ".join(words)


def cases(quick: bool) -> Iterator[Case]:
    """Yield cases of all selectors, gates, block sizes and precisions, each with some of the rest.

    A selector meets each gate in each precision and with each block size, and each block size in
    each precision. It does not meet all three together.

    Args:
        quick: each selector meets one gate and two precisions, and all paper-sized layers have
            losses.
    """
    chance = random.Random(0)
    for number, (selector, cls) in enumerate(sorted(Selector.registry.items())):
        gates = [None, *GATES] if cls.scores_blocks else [None]
        block_sizes = (1,) if selector in ("pkm", "pkm_ffn") else BLOCK_SIZES
        for i, gate in enumerate(gates):
            for j, block_size in enumerate(block_sizes):
                for k, kind in enumerate(KINDS):
                    if len(gates) > 1 and (i + k - j) % len(block_sizes):
                        continue
                    if quick and (i != number % len(gates) or kind not in QUICK_KINDS):
                        continue
                    yield Case(
                        "toy",
                        selector,
                        block_size,
                        kind,
                        gate,
                        padding=chance.random() < 0.5,
                        capacity=float(chance.random() < 0.4),
                        training=chance.random() < 0.7,
                        losses=chance.random() < 0.7,
                    )
    for selector, block_size, options in (
        ("avgk", 64, dict(center=True)),
        ("hash_layer", 256, dict(table="bigram")),
        ("gshard", 128, dict(second_expert="sampled")),
        ("vanilla_m", 64, dict(aggregate="max")),
        ("pkm", 1, dict(coefficients="activation")),
    ):
        for kind in ("bf16",) if quick else ("bf16", "autocast fp16"):
            yield Case("toy", selector, block_size, kind, options=options, padding=True)
    for selector, block_size, glu, shared in (
        *(("avgk", g, "silu", 2) for g in (64, 16, 1)),
        ("switch", 256, "gelu", 1),
        ("vanilla_m", 64, "silu", 1),
        ("pkm_ffn", 1, "silu", 0),
        ("pkm", 1, None, 8),
    ):
        for kind in ("bf16",) if quick else KINDS:
            yield Case("toy", selector, block_size, kind, padding=True, glu=glu, shared=shared)
    for selector, block_size in (
        *(("avgk", g) for g in (4096, 256, 64, 16, 4, 1)),  # B = 16 to 65536
        ("rand_hash", 64),
        ("switch", 4096),
        ("gshard", 2048),
        ("vanilla_m", 1),
        ("vanilla_m", 64),
        ("lorkm", 1),
        ("pkm", 1),
        ("pkm_ffn", 1),
    ):
        for kind in ("bf16",) if quick else KINDS:
            for losses in (True,) if quick else (True, False):
                yield Case("paper", selector, block_size, kind, losses=losses)


def build(case: Case) -> Any:
    """Build the memory of a case, without numbers."""
    sizes, cls = SIZES[case.size], Selector.registry[case.selector]
    ffn = sizes["ffn_embed_dim"]
    active = 1 if case.selector in ("hash_layer", "base") else max(1, ffn // case.block_size)
    if case.selector == "gshard":
        active = max(2, active)
    if case.selector == "pkm":
        active = 128
    config = MemoryConfig(
        embed_dim=sizes["embed_dim"],
        num_cells=EXPANSION * ffn + case.shared * case.block_size,
        block_size=case.block_size,
        active_blocks=active + case.shared,
        selector=cls.Config(**case.options),
        gate=case.gate,
        activation="gelu",
        vocab_size=100,
        token_counts=[1] * 100,
        capacity_factor=case.capacity,
        eval_capacity_factor=case.capacity,
        activation_dropout=0.1,
        glu=case.glu,
        shared_blocks=case.shared,
    )
    with torch.device("meta"):
        memory = SparseMemory(config)
    return memory.train(case.training)


def run(case: Case) -> Outcome:
    """Run forward and backward of one layer."""
    outcome = Outcome(str(case), MOST_LAUNCHES, WAITS_OF.get(case.selector, 0))
    record = recorder.Recorder()
    dtype, autocast = KINDS[case.kind]
    sizes = SIZES[case.size]
    shape = sizes["tokens"] // 4, 4
    memory = build(case)
    with recorder.fake_cuda():
        try:
            recorder.to_cuda(memory, dtype)
            x = torch.randn(*shape, sizes["embed_dim"], device="cuda", dtype=dtype)
            x.requires_grad_()
            ids = torch.zeros(*shape, 2, device="cuda", dtype=torch.int64)
            padding = torch.zeros(shape, device="cuda", dtype=torch.bool) if case.padding else None
            with record:
                with torch.autocast("cuda", autocast) if autocast else nullcontext():
                    out = memory(x, ids, padding_mask=padding, losses=case.losses)
                    loss = out.output.float().sum()
                    if out.balance_loss is not None:
                        loss = loss + out.balance_loss + out.z_loss
                loss.backward()
            for name, tensor in [("x", x), *memory.named_parameters()]:
                grad = tensor.grad
                if grad is not None and (grad.device.type, grad.dtype) != ("cuda", tensor.dtype):
                    outcome.faults[f"the gradient of {name} is {grad.dtype} on {grad.device}"] = 1
        except Exception as error:  # reported as a row
            outcome.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    outcome.take(record)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few layers of each selector, and few steps"
    )
    parser.add_argument("--json", metavar="FILE", help="also write what was found there")
    args = parser.parse_args()
    recorder.run_with_guard(sys.argv)
    warnings.simplefilter("ignore")  # libraries warn about each other
    logging.disable(logging.CRITICAL)
    layers, steps = list(cases(args.quick)), list(fake_step.steps(args.quick))
    runs = [partial(run, case) for case in layers]
    runs += [partial(fake_step.run, step) for step in steps]
    outcomes = []
    for i, run_one in enumerate(runs, 1):
        outcomes.append(run_one())
        for line in outcomes[-1].problems:
            print(line, flush=True)
        if i % 50 == 0:
            print(f"{i} of {len(runs)} cases", flush=True)
    bad = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(layers)} layers and {len(steps)} training steps, {bad} with problems")
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(outcome) for outcome in outcomes], file, indent=1)
    recorder.leave(int(bool(bad)))


if __name__ == "__main__":
    main()
