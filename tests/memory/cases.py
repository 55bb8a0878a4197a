"""The memories that the tests build, and their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryConfig, MemoryOutput, ProcessGroups, SparseMemory, gate
from fairseq_sffn.memory.compute import kernels
from fairseq_sffn.memory.selectors.aoe import AoE
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.memory.selectors.gshard import GShard
from fairseq_sffn.memory.selectors.hash_layer import HashLayer
from fairseq_sffn.memory.selectors.lorkm import LoRKM
from fairseq_sffn.memory.selectors.pkm import PKM
from fairseq_sffn.memory.selectors.sigma_moe import SigmaMoE
from fairseq_sffn.memory.selectors.vanilla_m import VanillaM

NATIVE = pytest.mark.skipif(kernels.load() is None, reason="no C++ compiler here")
NATIVE_ENGINES = ("native_loop", "native_embedding_bag")
PLAIN_ENGINES = ("loop", "embedding_bag", "masked", "tiled")
CPU_ENGINES = [*PLAIN_ENGINES, *(pytest.param(name, marks=NATIVE) for name in NATIVE_ENGINES)]
"""Engines that compute in fp64, as parameters of a test."""
ENGINES = PLAIN_ENGINES if kernels.load() is None else (*PLAIN_ENGINES, *NATIVE_ENGINES)
"""Those that can here, for a loop within a test."""

BIGRAM = HashLayer.Config(table="bigram")
SAMPLED = GShard.Config(second_expert="sampled")
UNNORMED = PKM.Config(heads=2, coefficients="activation", query_norm="none", query_dim=6)
DROPPED = SigmaMoE.Config(expert_dropout=0.3)
NORMALIZED = AvgK.Config(normalize_keys=True)
VALUE_NORM = AvgK.Config(normalize_keys=True, value_norm=True)
CASES = {
    "avgk-g1": dict(selector="avgk", num_cells=32, block_size=1, active_blocks=8),
    "avgk-g3": dict(selector="avgk", num_cells=24, block_size=3, active_blocks=4),
    "avgk-g4": dict(selector="avgk", num_cells=32, block_size=4, active_blocks=4),
    "avgk-g16": dict(selector="avgk", num_cells=64, block_size=16, active_blocks=2),
    "avgk-whole": dict(selector="avgk", num_cells=64, block_size=64, active_blocks=1),
    "avgk-normalized": dict(selector=NORMALIZED, num_cells=24, block_size=3, active_blocks=4),
    "avgk-value_norm": dict(selector=VALUE_NORM, num_cells=32, block_size=4, active_blocks=4),
    "vanilla_m-g1": dict(selector="vanilla_m", num_cells=24, block_size=1, active_blocks=6),
    **{
        f"vanilla_m-{aggregate}": dict(
            selector=VanillaM.Config(aggregate), num_cells=24, block_size=4, active_blocks=2
        )
        for aggregate in ("avg", "avg_abs", "max", "min", "l2")
    },
    "lorkm-g1": dict(selector=LoRKM.Config(rank=3), num_cells=24, block_size=1, active_blocks=6),
    "lorkm-g4": dict(
        selector=LoRKM.Config("max", rank=3), num_cells=24, block_size=4, active_blocks=2
    ),
    "pkm": dict(selector=PKM.Config(heads=2), num_cells=12, block_size=1, active_blocks=6),
    "pkm-activation": dict(selector=UNNORMED, num_cells=12, block_size=1, active_blocks=6),
    "pkm-prime": dict(selector=PKM.Config(heads=1), num_cells=7, block_size=1, active_blocks=3),
    "pkm_ffn": dict(selector="pkm_ffn", num_cells=24, block_size=1, active_blocks=5),
    "rand_hash": dict(selector="rand_hash", num_cells=24, block_size=3, active_blocks=3),
    "hash_layer": dict(selector="hash_layer", num_cells=32, block_size=8, active_blocks=1),
    "hash_layer-bigram": dict(selector=BIGRAM, num_cells=32, block_size=8, active_blocks=1),
    "switch-top1": dict(selector="switch", num_cells=32, block_size=8, active_blocks=1),
    "switch-top2": dict(selector="switch", num_cells=32, block_size=8, active_blocks=2),
    "gshard": dict(selector="gshard", num_cells=16, block_size=4, active_blocks=2),
    "gshard-top3": dict(selector="gshard", num_cells=16, block_size=4, active_blocks=3),
    "gshard-sampled": dict(selector=SAMPLED, num_cells=16, block_size=4, active_blocks=2),
    "base": dict(selector="base", num_cells=16, block_size=4, active_blocks=1),
    "moe": dict(selector="moe", num_cells=24, block_size=3, active_blocks=3),
    "sigma_moe": dict(selector=DROPPED, num_cells=24, block_size=3, active_blocks=3),
    "aoe": dict(selector=AoE.Config(rank=2), num_cells=24, block_size=3, active_blocks=3),
    "aoe-g8": dict(selector=AoE.Config(rank=3), num_cells=32, block_size=8, active_blocks=2),
    "hash_moe": dict(selector="hash_moe", num_cells=24, block_size=3, active_blocks=3),
    "avgk-glu": dict(num_cells=32, block_size=4, active_blocks=4, glu="silu"),
    "vanilla_m-glu": dict(
        selector=VanillaM.Config("max"), num_cells=24, block_size=4, active_blocks=2, glu="silu"
    ),
    "pkm_ffn-glu": dict(
        selector="pkm_ffn", num_cells=24, block_size=1, active_blocks=5, glu="gelu"
    ),
    "rand_hash-glu": dict(
        selector="rand_hash", num_cells=24, block_size=3, active_blocks=3, glu="silu"
    ),
    "avgk-shared": dict(num_cells=40, block_size=4, active_blocks=5, shared_blocks=2),
    "pkm-shared": dict(
        selector=PKM.Config(heads=2), num_cells=15, block_size=1, active_blocks=7, shared_blocks=3
    ),
    "rand_hash-shared": dict(
        selector="rand_hash", num_cells=27, block_size=3, active_blocks=3, shared_blocks=1
    ),
    "switch-shared": dict(
        selector="switch",
        num_cells=40,
        block_size=8,
        active_blocks=2,
        shared_blocks=1,
        glu="silu",
    ),
    "gshard-glu": dict(selector="gshard", num_cells=16, block_size=4, active_blocks=2, glu="gelu"),
}
GATES = list(gate.GATES)
SELECTORS = {
    case: MemoryConfig(embed_dim=8, vocab_size=10, token_counts=[1] * 10, **sizes).selector_class
    for case, sizes in CASES.items()
}
"""Case -> class of its selector."""
UNSCORED = [case for case, selector in SELECTORS.items() if not selector.scores_blocks]
FULL_KEYS = [
    case
    for case, sizes in CASES.items()
    if SELECTORS[case].key_table == "full" and not sizes.keys() & {"glu", "shared_blocks"}
]
FEW_GATES = ["none", "softmax"]
WITH_EVERY_GATE = ("avgk-g4", "switch-top2", "pkm", "moe", "hash_moe")


def gates_of(case: str) -> list[str]:
    """Return the gates that the tests of every case combine with this one.

    A gate reads scores and blocks alone, so that a few cases are enough for all gates: a choice by
    the cells of a block, by a router, by product keys, and by token ids.
    """
    if case in UNSCORED:
        return ["none"]
    if case.endswith(("-glu", "-shared")):
        return ["none", "sigmoid_renormalized"]
    return GATES if case in WITH_EVERY_GATE else FEW_GATES


CASE_GATES = [(case, gate) for case in CASES for gate in gates_of(case)]
VOCAB_SIZE = 10
TOKEN_COUNTS = [40, 30, 20, 10, 9, 8, 3, 2, 1, 0]


def build(
    case: str = "avgk-g4",
    dtype: torch.dtype = torch.float64,
    groups: ProcessGroups | None = None,
    **changes,
) -> SparseMemory:
    """Build a memory of a case, without a gate if it has no scores. init_scale is 2 and norms are
    not at their initial values, so that scores and gates differ clearly."""
    sizes = dict(embed_dim=8, vocab_size=VOCAB_SIZE, token_counts=TOKEN_COUNTS, init_scale=2.0)
    if case in UNSCORED:
        changes.pop("gate", None)
    memory = SparseMemory(MemoryConfig(**{**sizes, **CASES[case], **changes}), groups)
    for module in memory.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return memory.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Draw hidden states (*shape, 8) and the last two token ids at each position (*shape, 2)."""
    return torch.randn(*shape, 8, dtype=dtype), torch.randint(VOCAB_SIZE, (*shape, 2))


def grads_of(
    memory: SparseMemory, x: Tensor, token_ids: Tensor | None, cotangent: Tensor, losses=True
) -> tuple[MemoryOutput, dict[str, Tensor]]:
    """Return a memory's result, and its output and all gradients by name."""
    x = x.clone().requires_grad_()
    out = memory(x, token_ids, losses=losses)
    (out.output * cotangent).sum().backward()
    grads = {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}
    return out, {"output": out.output, "x": x.grad, **grads}


def close(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = 1e-10) -> None:
    """Check that values, shapes and dtypes are equal up to a tolerance."""
    same_kind = actual.shape == expected.shape and actual.dtype == expected.dtype
    if same_kind and torch.allclose(actual, expected, rtol=0, atol=tolerance):
        return  # assert_close takes ten times as long
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{what}\n{text}"
    )
