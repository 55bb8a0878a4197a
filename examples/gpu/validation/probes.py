"""Points 1 and 4: what PyTorch supports here, and where the host waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from recorder import WAITS_OF

from fairseq_sffn.memory import Selector
from fairseq_sffn.memory.compute.grouped_mm import MOST_GROUPS
from fairseq_sffn.memory.compute.tiled_products import implementation
from fairseq_sffn.memory.renamed import grouped_mm

from .layers import SINGLE_CELLS, Case, build
from .point import Row, Setting, asserted, bounded, told
from .twins import forward_backward

GROUPED_TOLERANCE = 2e-2
WAITS = "called a synchronizing"
"""Text in PyTorch's warning of each wait. PyTorch also warns once that it does not see all
waits."""


def groups(setting: Setting) -> Iterator[Row]:
    """Record which engine runs, and which groups ``grouped_mm`` accepts (point 1)."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        module = implementation(torch.device(setting.device), dtype).__name__
        yield told(f"engine 'tiled' in {dtype}", module=module.rpartition(".")[2])
    most = MOST_GROUPS if setting.device == "cuda" else 15
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _try_groups("the most groups", setting.device, dtype, [3] * most)
        yield _try_groups("empty groups", setting.device, dtype, [0, 5, 0, 0, 16, 0])
        yield _try_groups("the last group ends the rows", setting.device, dtype, [7, 9])
    # All known versions refuse these. They are recorded, since an engine could use them.
    yield {
        **_try_groups("one group more", setting.device, torch.bfloat16, [3] * (most + 1)),
        "passed": None,
    }


def _try_groups(what: str, device: str, dtype: torch.dtype, sizes: list[int]) -> Row:
    """Compare the product of rows with the matrix of their group with a product for each group."""
    what = f"grouped_mm, {what}: {len(sizes)} groups, {dtype}"
    rows_PX = torch.randn(sum(sizes), 64, device=device, dtype=dtype)
    matrices_BXY = torch.randn(len(sizes), 64, 32, device=device, dtype=dtype)
    ends_B = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    try:
        got_PY = grouped_mm(rows_PX, matrices_BXY, offs=ends_B).double()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return asserted(what, False, error=f"{type(error).__name__}: {error}".splitlines()[0])
    parts = rows_PX.double().split(sizes)
    want_PY = torch.cat([part @ m for part, m in zip(parts, matrices_BXY.double(), strict=True)])
    difference = ((got_PY - want_PY).abs().max() / want_PY.abs().max()).item()
    return bounded(what, difference, GROUPED_TOLERANCE)


def synchronizations(setting: Setting) -> Iterator[Row]:
    """Count how often the host waits for the device in a layer's forward and backward pass (point
    4).

    No layer should wait, except BASE, which copies its scores to the CPU once.
    """
    for name in Selector.registry:
        for padded, capacity in ((False, 0.0), (True, 1.0)):
            if capacity and name in SINGLE_CELLS:
                continue
            g = 1 if name in SINGLE_CELLS else 64
            case = Case(name, g, "bf16", padded=padded, capacity=capacity)
            memory, inputs = build(case)
            memory = memory.to(setting.device, torch.bfloat16)
            inputs = inputs.to(setting.device, torch.bfloat16)

            def run(memory: Any = memory, inputs: Any = inputs) -> None:
                forward_backward(memory, inputs)

            waits = _waits(run)
            what = f"the host waits for the device: {case}"
            yield bounded(what, len(waits), WAITS_OF.get(name, 0), where=waits[:5])


def _waits(run: Callable[[], None]) -> list[str]:
    """Return where ``run`` waits, after a first run that compiles."""
    run()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{warning.filename.rpartition('/')[2]}:{warning.lineno}"
        for warning in caught
        if WAITS in str(warning.message)
    ]
