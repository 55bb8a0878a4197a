"""Interleaved timing, its statistics, and its JSON file, for all parts of the benchmark.

It needs PyTorch only, so peers.py can use it in an environment without this project.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SEED = 1
ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = {"cpu": 1, "cuda": 3}
"""Device -> number of first rounds that are not counted."""


class Work(NamedTuple):
    """A function to time. ``prepare`` runs before each ``run`` and is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Place(NamedTuple):
    """The device and dtype with which a layer is measured."""

    device: str = "cpu"
    dtype: str = "fp32"

    @property
    def tensors(self) -> dict[str, Any]:
        """Return arguments for ``Tensor.to`` and for functions that make tensors."""
        return {"device": self.device, "dtype": DTYPES[self.dtype]}

    def describe(self) -> dict[str, Any]:
        """Return device, card, dtype and versions, for a row of results."""
        result: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if self.device == "cuda":
            result |= {"card": torch.cuda.get_device_name(), **versions()}
        return result


def versions() -> dict[str, str | None]:
    """Return the versions of PyTorch, its CUDA, and Triton."""
    triton = None
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("triton").__version__
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}


def seconds(
    work: Work, clock: Callable[[], float] = time.perf_counter, device: str = "cpu"
) -> float:
    """Time one run. On a GPU, CUDA events measure the time, so the clock does not change it."""
    work.prepare()
    if device == "cuda":
        return event_seconds(work.run)
    start = clock()
    work.run()
    return clock() - start


def event_seconds(run: Callable[[], object]) -> float:
    """Return the time on the GPU from before the first kernel of ``run`` to after its last."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median and quartiles."""
    values = list(values)
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else (values[0],) * 3
    )
    return {"median": median, "low": low, "high": high}


def compare(
    base: Work,
    others: dict[str, Work],
    repeats: int,
    label: str = "",
    clock: Callable[[], float] = time.perf_counter,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Time each work right after ``base``, in turn: base, a, base, b, base, a, ...

    A slow phase of the machine then affects both sides of a ratio. The first round is not counted;
    on a GPU the first three are not, as they compile kernels.

    Returns:
        For each name: spreads of ``ratio``, ``seconds`` and ``base_seconds``. ``ratio`` is formed
        of neighbouring runs, not of medians.
    """
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    for i in range(1 - WARM_UP[device], repeats + 1):
        for name, work in others.items():
            pair = seconds(base, clock, device), seconds(work, clock, device)
            if i > 0:
                pairs[name].append(pair)
        progress(f"{label} round {max(i, 0)}/{repeats}", last=i == repeats)
    return {
        name: {
            "ratio": spread(mine / its for its, mine in timed),
            "seconds": spread(mine for _, mine in timed),
            "base_seconds": spread(its for its, _ in timed),
        }
        for name, timed in pairs.items()
    }


def progress(text: str, last: bool = False) -> None:
    """Show a line that overwrites itself on a terminal. A file gets its last state only."""
    if sys.stderr.isatty():
        print(f"\r   {text:<60}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(f"   {text}", file=sys.stderr, flush=True)


CPU = Place()


def dense_ffn(width: int, cells: int, place: Place = CPU) -> nn.Module:
    """Build the FFN that sparse layers are compared with."""
    layers = nn.Linear(width, cells), nn.ReLU(), nn.Linear(cells, width)
    return nn.Sequential(*layers).to(**place.tensors)


def hidden_states(tokens: int, width: int, place: Place = CPU) -> Tensor:
    """Return (tokens, width) normal numbers that require a gradient, as in the middle of a
    model."""
    return torch.randn(tokens, width, **place.tensors).requires_grad_()


def forward_backward(
    module: nn.Module, x: Tensor, forward: Callable[[Tensor], Any] | None = None
) -> Work:
    """Prepare forward and backward of a module.

    Args:
        module: the module; its gradients are None before each pass, as after fairseq's zero_grad.
        x: input; requires a gradient.
        forward: function that returns the output, or the output and a loss to add; by default
            ``module``.
    """
    gradient = torch.randn_like(x)

    def prepare() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None

    def run() -> None:
        result = (forward or module)(x)
        output, loss = result if isinstance(result, tuple) else (result, None)
        if loss is None:
            output.backward(gradient.view_as(output))
        else:
            torch.autograd.backward([output, loss], [gradient.view_as(output), None])

    return Work(run, prepare)


def fingerprint(part: str, of_project: bool) -> str:
    """Hash the code that a part measures: its own file, this file and, for most parts, the
    project."""
    files = [Path(__file__), Path(__file__).with_name(f"{part}.py")]
    if of_project:
        files += sorted(
            p for p in (ROOT / "fairseq_sffn").rglob("*") if p.suffix in (".py", ".cpp")
        )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def arguments(description: str | None, places: bool = False) -> argparse.ArgumentParser:
    """Make a part's parser.

    Args:
        description: text of ``--help``.
        places: whether the part can be measured on a GPU and in half precision.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    if places:
        parser.add_argument("--device", choices=list(WARM_UP), default="cpu")
        parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    return parser


def place_of(args: argparse.Namespace) -> Place:
    """Return where to measure a part. Exits with one line if there is no such GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no GPU here")
    return Place(args.device, args.dtype)


def run_part(
    part: str,
    args: argparse.Namespace,
    measure: Callable[[], list[dict[str, Any]]],
    of_project: bool = True,
) -> None:
    """Measure a part and write its JSON, unless the file is there with the same settings and
    code."""
    if args.repeats < 1:
        sys.exit(f"--repeats {args.repeats}: must be at least 1")
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "force")}
    settings["code"] = fingerprint(part, of_project)
    if of_project:
        from fairseq_sffn.memory.compute import kernels

        settings["kernels"] = kernels.load() is not None
    there = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if there.get("settings") == settings and not args.force:
        progress(f"{args.output.stem}: there already", last=True)
        return
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    start = time.perf_counter()
    rows = measure()
    result = {
        "part": part,
        "settings": settings,
        "command": " ".join(["python", *sys.argv]),
        "seed": SEED,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if settings.get("device") == "cuda" else None,
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, args.output)
