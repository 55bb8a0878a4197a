"""Runs one of four processes that compare sharded memories with a memory in one process.

It compares initial tables, outputs, selections, losses, counts, gradients and bytes sent. torchrun
starts it with the name of a file, to which rank 0 writes the result.
"""

import copy
import json
import pickle
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
from fairseq_sffn.memory import ConfigError, ProcessGroups, SparseMemory  # noqa: E402
from fairseq_sffn.memory.selectors.avgk import AvgK  # noqa: E402
from fairseq_sffn.memory.selectors.base_layer import BASELayer  # noqa: E402
from fairseq_sffn.memory.selectors.sigma_moe import SigmaMoE  # noqa: E402
from fairseq_sffn.memory.sharding import SHARDED, check_sharding  # noqa: E402
from tests import commands  # noqa: E402
from tests.memory.cases import CASES, UNSCORED, build, close, tokens  # noqa: E402

TOKENS = (7, 0, 12, 3)
"""Tokens of each rank. The numbers are uneven, and one rank has none."""


OTHERS = {
    "base": ("base", dict(selector=BASELayer.Config(scope="world"))),
    "avgk-balanced": ("avgk-g4", dict(balance_rate=0.3)),
    "avgk-up_abs": ("avgk-glu", dict(selector=AvgK.Config(mean_of="up_abs"))),
    "avgk-averaged": ("avgk-value_norm", dict(selector=AvgK.Config(value_norm=True, key_ema=0.5))),
    "avgk-centered": ("avgk-g4", dict(selector=AvgK.Config(center=True))),
}
"""Options that several processes need, or that have no case of their own."""


class Meter:
    """Counts the bytes of ``all_to_all_single`` that go to other ranks."""

    def __init__(self) -> None:
        self.sent, self.original = 0, dist.all_to_all_single
        dist.all_to_all_single = self

    def __call__(self, output, input, received=None, sent=None, group=None):
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        sizes = sent or [len(input) // ranks] * ranks
        row = input[:1].numel() if len(input) else input.new_empty(1, *input.shape[1:]).numel()
        self.sent += (sum(sizes) - sizes[me]) * row * input.element_size()
        return self.original(output, input, received, sent, group=group)


def compare(case: str, shards: int, groups: dict, gate: str) -> None:
    """Raise AssertionError if anything differs."""
    torch.manual_seed(0)
    case, changes = OTHERS.get(case, (case, {}))
    alone = build(case, gate=gate, **changes)
    blocks, replicas = groups[shards]
    groups = ProcessGroups(dist.group.WORLD, blocks)
    torch.manual_seed(0)
    sharded = build(case, gate=gate, groups=groups, **changes)
    for name, parameter in sharded.named_parameters():  # all are initialised alike
        whole = dict(alone.named_parameters())[name]
        cut = name in SHARDED and shards > 1
        assert hasattr(parameter, "expert") == cut
        close(parameter, whole[groups.part_of(len(whole))] if cut else whole, name, 0)

    x_ND, ids_N2 = tokens(sum(TOKENS))
    cotangent_ND = torch.randn_like(x_ND)
    padding_N = torch.rand(len(x_ND)) < 0.2
    rank = dist.get_rank()
    own = slice(sum(TOKENS[:rank]), sum(TOKENS[: rank + 1]))
    outcomes = []
    meter = Meter()
    for memory, part in ((alone, slice(None)), (sharded, own)):
        x = x_ND[part].clone().requires_grad_()
        torch.manual_seed(rank if memory is sharded else 0)  # all ranks use the draws of rank 0
        out = memory(x, ids_N2[part], padding_mask=padding_N[part])
        objective = (out.output * cotangent_ND[part]).sum()
        share = 1.0 if memory is alone else len(x) / len(x_ND)
        for loss in (out.balance_loss, out.z_loss):
            if loss is not None:
                objective = objective + 3 * share * loss
        objective.backward()
        outcomes.append((x, out))
    dist.all_to_all_single = meter.original
    assert int(outcomes[1][1].usage.sent) == meter.sent, (case, shards, "bytes")
    assert (shards > 1) == (meter.sent > 0)  # at least the numbers of rows are sent
    (x, want), (own_x, got) = outcomes
    assert torch.equal(got.selection.blocks, want.selection.blocks[own])
    close(got.output, want.output[own], "output")
    close(own_x.grad, x.grad[own], "x")
    for name in ("balance_loss", "z_loss"):
        if getattr(want, name) is not None:
            close(getattr(got, name), getattr(want, name), name)
    for total, part in zip(want.usage[:3], got.usage[:3], strict=True):
        dist.all_reduce(part := part.clone())
        close(part.double(), total.double(), "usage", 1e-5)
    for (name, parameter), whole in zip(
        sharded.named_parameters(), alone.parameters(), strict=True
    ):
        if whole.grad is None:
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        cut = hasattr(parameter, "expert")
        dist.all_reduce(grad, group=replicas if cut else dist.group.WORLD)
        close(grad, whole.grad[groups.part_of(len(whole))] if cut else whole.grad, name)
    compare_scopes(alone, sharded, x_ND.detach(), ids_N2, padding_N, own)
    for memory in (alone, sharded):
        memory.end_update()
    for name, buffer in sharded.named_buffers():
        close(buffer.double(), dict(alone.named_buffers())[name].double(), name, 1e-5)
    assert copy.deepcopy(sharded).groups is groups
    assert shards > 1 or pickle.loads(pickle.dumps(sharded)).groups == ProcessGroups()
    sharded.eval(), alone.eval()
    with torch.no_grad():
        close(sharded(x_ND[own], ids_N2[own]).output, alone(x_ND, ids_N2).output[own], "evaluation")


def compare_scopes(
    alone: SparseMemory,
    sharded: SparseMemory,
    x_ND: Tensor,
    ids_N2: Tensor,
    padding_N: Tensor,
    own: slice,
) -> None:
    """Compare the balance losses of two micro-batches of an update, and those of sequences."""

    def loss(memory: SparseMemory, part: slice, scope: str) -> Tensor | None:
        torch.manual_seed(1)  # sigma_moe draws which blocks it leaves out
        out = memory(x_ND[part], ids_N2[part], padding_mask=padding_N[part], balance_scope=scope)
        return out.balance_loss

    everything = slice(None)
    if loss(alone, everything, "global") is None:
        assert loss(sharded, own, "global") is None
        return
    loss(sharded, own, "global")
    close(loss(sharded, own, "global"), loss(alone, everything, "global"), "global")
    if isinstance(alone.selector, BASELayer | SigmaMoE):
        return  # BASE assigns the tokens of all sequences together; an entropy is of all tokens
    # Each rank's tokens are a sequence. One rank has none, another may have padding alone.
    ends = [sum(TOKENS[: rank + 1]) for rank in range(4)]
    parts = [slice(end - count, end) for end, count in zip(ends, TOKENS, strict=True)]
    parts = [part for part in parts if not padding_N[part].all()]
    with torch.no_grad():  # running means stay
        mean = sum(loss(alone, part, "sequence") for part in parts) / len(parts)
        close(loss(sharded, own, "sequence"), mean, "sequence")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    pairs, crossed = (
        [dist.new_group(g) for g in gs] for gs in ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    )
    rank = dist.get_rank()
    alone = [dist.new_group([r]) for r in range(4)][rank]
    groups = {
        1: (None, dist.group.WORLD),
        2: (pairs[rank // 2], crossed[rank % 2]),
        4: (dist.group.WORLD, alone),
    }
    report = {}
    for case in dict.fromkeys([*CASES, *OTHERS]):
        for shards in groups:
            for gate in ("none", "sigmoid"):
                if case == "gshard-sampled" or (gate == "sigmoid" and case in UNSCORED):
                    continue
                try:
                    check_sharding(build(OTHERS.get(case, (case,))[0]).config, shards)
                    compare(case, shards, groups, gate)
                    outcome = "equal"
                except ConfigError as error:
                    outcome = f"refused: {error}"
                except Exception:
                    outcome = traceback.format_exc()
                    print(rank, outcome, flush=True)
                outcomes = [None] * 4
                dist.all_gather_object(outcomes, outcome)
                wrong = [text for text in outcomes if text != outcomes[0]] or [outcome]
                report[f"{case}/{shards}/{gate}"] = max(wrong, key=len)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))
    commands.leave()


main()
