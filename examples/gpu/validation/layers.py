"""Points 2 and 3: layers against fp64 layers that use the same blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fairseq_sffn.memory import MemoryConfig, Selector, SparseMemory
from fairseq_sffn.memory.gate import GATES

from .point import Row, Setting, asserted, bounded, tried
from .twins import Inputs, errors, forced, forward_backward, twin_of

WIDTH, FFN, EXPANSION, TOKENS, VOCABULARY = 64, 256, 4, 203, 50
BLOCK_SIZES = (1, 4, 16, 64, 256)
SINGLE_CELLS = ("pkm", "pkm_ffn")
OPTIONS = {"sigma_moe": {"expert_dropout": 0.0}}
"""Selector -> options without which a GPU and a CPU would draw different blocks."""
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "autocast bf16": (torch.float32, torch.bfloat16),
    "autocast fp16": (torch.float32, torch.float16),
    "fp64": (torch.float64, None),
}
"""Name -> dtype of parameters and hidden states, and dtype of autocast."""

TOLERANCE = {
    "fp32": 5e-5,
    "bf16": 1e-1,
    "fp16": 2e-2,
    "autocast bf16": 1e-1,
    "autocast fp16": 2e-2,
    "fp64": 1e-9,
}
"""Largest allowed error of a tensor, relative to its largest number. On a CPU the same cases reach
1.1e-6, 0.064, 0.008, 0.050, 0.008 and 2e-15. PKM's norm has the largest errors."""


BROKEN = "CUDA error"
"""Text in PyTorch's message after a failed kernel. The process cannot use its GPU afterwards."""

TWICE = "deterministic algorithms: the same sums twice"


class Case(NamedTuple):
    """A layer to check.

    Attributes:
        padded: whether some tokens are padding.
        capacity: the capacity factor.
        skewed: whether all tokens choose about the same blocks.
        losses: whether balance and z loss count.
        engine: name of the engine; ``None``: chosen by size.
    """

    selector: str
    block_size: int
    dtype: str = "fp32"
    gate: str | None = None
    padded: bool = True
    capacity: float = 0.0
    skewed: bool = False
    losses: bool = True
    engine: str | None = None
    tokens: int = TOKENS

    @property
    def active_blocks(self) -> int:
        """Return the number that makes active cells equal the FFN's width, or the method's own
        number."""
        most = {"base": 1, "hash_layer": 1, "pkm": 128}.get(self.selector, FFN)
        least = 2 if self.selector == "gshard" else 1
        return max(least, min(most, FFN // self.block_size))

    def __str__(self) -> str:
        defaults = self._field_defaults
        more = [
            f"{name}={value}"
            for name, value in self._asdict().items()
            if name in defaults and name != "dtype" and value != defaults[name]
        ]
        return ", ".join([f"{self.selector} g={self.block_size} {self.dtype}", *more])


def cases(fake: bool) -> Iterator[Case]:
    """Yield the cases, the most informative first."""
    if fake:
        for name in Selector.registry:
            yield Case(name, 1 if name in SINGLE_CELLS else 16, engine="tiled")
        yield Case("avgk", 64, "bf16", "softmax", capacity=1.0, engine="tiled")
        yield Case("avgk", 16, skewed=True, losses=False, engine="tiled")
        yield Case("avgk", 16, tokens=0, padded=False, engine="tiled")
        return
    yield from (Case("avgk", g, dtype) for dtype, g in itertools.product(DTYPES, BLOCK_SIZES))
    yield from special_cases()
    others = [name for name in Selector.registry if name != "avgk"]
    for dtype, name in itertools.product([d for d in DTYPES if d != "fp64"], others):
        for g in BLOCK_SIZES if name not in SINGLE_CELLS else (1,):
            yield Case(name, g, dtype)
    for dtype, name in itertools.product(("fp32", "bf16"), Selector.registry):
        if Selector.registry[name].scores_blocks:
            for gate in GATES:
                yield Case(name, 1 if name in SINGLE_CELLS else 64, dtype, gate)


def special_cases() -> Iterator[Case]:
    """Yield cases of capacity, skewed routing, no padding, no losses, few tokens and other
    engines."""
    for dtype in ("fp32", "bf16"):
        for g in (1, 16, 256):
            yield Case("avgk", g, dtype, "sigmoid", capacity=1.0)
            yield Case("avgk", g, dtype, skewed=True)
            yield Case("rand_hash", g, dtype, skewed=True)
            yield Case("avgk", g, dtype, padded=False, losses=False)
        for name in ("vanilla_m", "lorkm", "pkm_ffn"):
            yield Case(name, 1, dtype, padded=False, losses=False)
        yield from (Case("avgk", 16, dtype, padded=False, tokens=n) for n in (0, 1, 5))
        yield from (
            Case("avgk", 16, dtype, engine=name) for name in ("tiled", "masked", "embedding_bag")
        )
        yield Case("avgk", 1, dtype, engine="tiled")
        yield from (Case("avgk", 64, dtype, engine=name) for name in ("grouped", "loop"))


def build(case: Case) -> tuple[SparseMemory, Inputs]:
    """Build a layer in training mode and its input, on a CPU in fp32. Each call gives the same
    ones."""
    torch.manual_seed(0)
    config = MemoryConfig(
        embed_dim=WIDTH,
        num_cells=EXPANSION * FFN,
        block_size=case.block_size,
        active_blocks=case.active_blocks,
        selector=Selector.registry[case.selector].Config(**OPTIONS.get(case.selector, {})),
        gate=case.gate,
        activation="gelu",  # relu's slope jumps, so rounding would change gradients
        vocab_size=VOCABULARY,
        token_counts=[1] * VOCABULARY,
        capacity_factor=case.capacity,
        init_scale=2.0,
        engine=case.engine,
    )
    memory = SparseMemory(config)
    x_ND = torch.randn(case.tokens, WIDTH)
    token_ids_N = torch.randint(VOCABULARY, (case.tokens,))
    if case.skewed:
        x_ND = x_ND[:1] + 0.1 * x_ND
        token_ids_N.zero_()
    padding_N = torch.rand(case.tokens) < 0.2 if case.padded else None
    cotangent_ND = torch.randn(case.tokens, WIDTH)
    return memory, Inputs(x_ND, token_ids_N, padding_N, cotangent_ND, case.losses)


def check_case(case: Case, device: str) -> Row:
    """Compare output, losses and all gradients of one layer with fp64 on a CPU."""
    memory, inputs = build(case)
    dtype, autocast = DTYPES[case.dtype]
    memory = memory.to(device, dtype)
    inputs = inputs.to(device, dtype)
    out, got = forward_backward(memory, inputs, autocast)
    blocks_NA = out.selection.blocks.cpu()
    twin = twin_of(memory, "cpu", "embedding_bag" if case.block_size == 1 else "loop")
    exact = inputs.to("cpu", torch.float64)
    with forced(blocks_NA) as lost:
        exact_out, want = forward_backward(twin, exact)
    by_name = errors(got, want)
    worst = max(by_name, key=lambda name: by_name[name], default="")
    tolerance = TOLERANCE[case.dtype]
    faults = list(other_faults(case, out, exact_out, got, blocks_NA))
    if max(lost, default=0.0) > tolerance and case.selector != "base":
        faults.append(f"the scores of the selected blocks are {max(lost):.2g} below the best")
    row = bounded(str(case), by_name.get(worst, 0.0), tolerance, worst=worst)
    row["passed"] &= not faults
    return {**row, "faults": faults} if faults else row


def other_faults(
    case: Case, out: Any, exact_out: Any, got: dict[str, torch.Tensor], blocks_NA: torch.Tensor
) -> Iterator[str]:
    """Yield faults of what is exact: counts, distinct blocks, no gradient for unused blocks."""
    distinct = bool((blocks_NA.sort(dim=1).values.diff(dim=1) > 0).all())
    if case.selector != "pkm" and not distinct:  # its heads may choose the same block
        yield "a token has a block twice"
    for name in ("counts", "dropped"):
        ours, theirs = getattr(out.usage, name).cpu(), getattr(exact_out.usage, name)
        if not torch.equal(ours, theirs):
            yield f"usage.{name} differs"
    # Padding is computed too. Dropped assignments are not.
    kept_NA = out.selection.kept
    used = blocks_NA if kept_NA is None else blocks_NA[kept_NA.cpu()]
    gradient_BGD = got["gradient of values"].cpu().unflatten(0, (-1, case.block_size))
    used_B = torch.zeros(len(gradient_BGD), dtype=torch.bool)
    used_B[used.flatten()] = True
    if gradient_BGD[~used_B].any():
        yield "a block that no token uses has a gradient"


def every_method(setting: Setting) -> Iterator[Row]:
    """Check every method (point 2)."""
    for case in cases(setting.fake):

        def check(case: Case = case) -> Row:
            return check_case(case, setting.device)

        row = tried(str(case), check)
        yield row
        if BROKEN in row.get("error", ""):
            raise RuntimeError(f"{case}: no later kernel of this process runs")
    yield tried(TWICE, lambda: same_sums_twice(setting))


def same_sums_twice(setting: Setting) -> Row:
    """Check that two passes agree bit for bit with ``torch.use_deterministic_algorithms``."""
    case = Case("avgk", 16, "bf16", "sigmoid", capacity=1.0, engine="tiled")
    memory, inputs = build(case)
    memory = memory.to(setting.device, torch.bfloat16)
    inputs = inputs.to(setting.device, torch.bfloat16)
    torch.use_deterministic_algorithms(True)  # raises at an operator that is not deterministic
    try:
        (_, first), (_, second) = (forward_backward(memory, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    return asserted(TWICE, not differ, differ=differ)


def paper_size(setting: Setting) -> Iterator[Row]:
    """Check 65,536 cells, N = 8192, d = 1024, in blocks of 64, 16 and 4096 (point 3).

    PyTorch in fp64 on the same device checks all tokens. A CPU checks the first tokens.
    """
    tokens, width, ffn, dtype = 8192, 1024, 4096, "bf16"
    sizes: tuple[int, ...] = (64, 16, 4096)
    if setting.fake:
        tokens, width, ffn, dtype, sizes = 96, 32, 128, "fp32", (2,)
    for g in sizes:
        torch.manual_seed(0)
        config = MemoryConfig(
            embed_dim=width,
            num_cells=16 * ffn,
            block_size=g,
            active_blocks=ffn // g,
            activation="gelu",
            engine="tiled" if setting.fake else None,
        )
        memory = SparseMemory(config).to(setting.device, DTYPES[dtype][0])
        x_ND, cotangent_ND = torch.randn(2, tokens, width).unbind()
        inputs = Inputs(x_ND, torch.zeros(tokens).long(), None, cotangent_ND, losses=False)
        inputs = inputs.to(setting.device, DTYPES[dtype][0])
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        out, got = forward_backward(memory, inputs)
        more: dict[str, Any] = {}
        if setting.device == "cuda":
            more["peak_bytes"] = torch.cuda.max_memory_allocated()
        what = f"avgk g={g}, B={config.num_blocks}, N={tokens}, d={width}, {dtype}"
        blocks_NA = out.selection.blocks
        exact = inputs.to(setting.device, torch.float64)
        with forced(blocks_NA):
            _, want = forward_backward(twin_of(memory, setting.device, "tiled"), exact)
        by_name = errors(got, want)
        worst = max(by_name, key=lambda name: by_name[name])
        yield bounded(
            f"{what}: fp64 by PyTorch", by_name[worst], TOLERANCE[dtype], worst=worst, **more
        )
        few = slice(0, 32)
        of_few = Inputs(exact.x_ND[few], exact.token_ids_N[few], None, exact.cotangent_ND[few])
        of_few.losses = False
        with forced(blocks_NA[few].cpu()):
            twin = twin_of(memory, "cpu", "embedding_bag")
            _, on_cpu = forward_backward(twin, of_few.to("cpu", torch.float64))
        names = ("output", "gradient of x")
        by_name = errors(
            {name: got[name][few] for name in names}, {name: on_cpu[name] for name in names}
        )
        yield bounded(
            f"{what}: fp64 on a CPU, {len(of_few.x_ND)} tokens",
            max(by_name.values()),
            TOLERANCE[dtype],
        )
