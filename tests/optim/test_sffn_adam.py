"""``sffn_adam`` against fairseq's ``adam``: the same updates, the same checkpoints."""

import copy
from types import SimpleNamespace

import commands
import pytest
import torch
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.optim.adam import Adam, FairseqAdam

from fairseq_sffn.errors import UsageError
from fairseq_sffn.optim.sffn_adam import FusedAdam

SETTINGS = [
    dict(),
    dict(weight_decay=0.1),
    dict(betas=(0.9, 0.98), eps=1e-6),
    dict(betas=(0.5, 0.6), eps=0.1, weight_decay=0.01),  # an eps that decides
    dict(betas=(0.0, 0.999)),
]


def parameters(dtype=torch.float64):
    torch.manual_seed(3)
    shapes = [(5, 4), (7,), (), (3, 2, 2), (4, 4)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[-1] = tensors[-1].t()  # not contiguous
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def train(optimizer, steps, skip=True, seed=0):
    """Gives random gradients, of any scale, and to some parameters none at times."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group.get("own_lr", 1.0) * 0.01 / (1 + step)
            for number, parameter in enumerate(group["params"]):
                grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(step % 4)
                absent = skip and (step + number) % 3 == 0
                parameter.grad = None if absent else grad.to(parameter.dtype)
        optimizer.step()


def assert_same(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_updates_are_those_of_fairseq(settings, skip, dtype, tolerance):
    ours, theirs, start = parameters(dtype), parameters(dtype), parameters(dtype)
    optimizers = FusedAdam(ours, **settings), Adam(theirs, **settings)
    for optimizer in optimizers:
        train(optimizer, 12, skip)
    assert_same(ours, theirs, tolerance)
    assert not torch.allclose(ours[0], start[0], atol=1e-3)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for ours_of, theirs_of in zip(*(s.values() for s in states), strict=True):
        assert ours_of.keys() == theirs_of.keys()
        assert ours_of["step"] == theirs_of["step"] and type(ours_of["step"]) is int
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same([ours_of[name]], [theirs_of[name]], 1e-6)


def test_groups_have_their_own_settings():
    results = []
    for kind in (FusedAdam, Adam):
        tensors = parameters()
        groups = [
            dict(params=tensors[:2], own_lr=3.0, weight_decay=0.2),
            dict(params=tensors[2:], betas=(0.8, 0.9), eps=1e-3),
        ]
        train(kind(groups), 5)
        results.append(tensors)
    assert_same(*results, 1e-12)


@pytest.mark.parametrize(("first", "second"), [(Adam, FusedAdam), (FusedAdam, Adam)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_either_goes_on_from_the_other(first, second, dtype):
    whole, parts = parameters(dtype), parameters(dtype)
    optimizer = first(whole, weight_decay=0.1)
    train(optimizer, 4)
    state = copy.deepcopy(optimizer.state_dict())
    for target, source in zip(parts, whole, strict=True):
        target.data.copy_(source.data)
    resumed = second(parts, weight_decay=0.1)
    resumed.load_state_dict(state)
    train(optimizer, 4, seed=1)
    train(resumed, 4, seed=1)
    assert_same(whole, parts, 1e-12 if dtype == torch.float64 else 1e-2)


def test_no_gradients_change_nothing():
    tensors, start = parameters(), parameters()
    optimizer = FusedAdam(tensors, weight_decay=0.1)
    assert optimizer.step(lambda: 7) == 7
    assert_same(tensors, start, 0)
    assert not optimizer.state


def test_sparse_gradients_are_refused():
    table = torch.nn.Parameter(torch.randn(4, 3))
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (4, 3))
    with pytest.raises(RuntimeError, match="sparse gradients"):
        FusedAdam([table]).step()


def config(**changes):
    options = dict(lr=[0.1], adam_betas="(0.9, 0.98)", adam_eps=1e-8, weight_decay=0.0)
    return SimpleNamespace(**(options | changes))


@pytest.mark.parametrize("name", ["use_old_adam", "fp16_adam_stats", "tpu"])
def test_refused_flags(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^{flag}: .* use --optimizer adam$"):
        OPTIMIZER_REGISTRY["sffn_adam"](config(**{name: True}), parameters())


def test_it_is_what_fairseq_builds():
    optimizer = OPTIMIZER_REGISTRY["sffn_adam"](config(weight_decay=0.3), parameters())
    assert isinstance(optimizer, FairseqAdam) and type(optimizer) is not FairseqAdam
    assert type(optimizer.optimizer) is FusedAdam
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.9, 0.98), 0.3)
    assert optimizer.supports_memory_efficient_fp16 and optimizer.supports_flat_params


OPTIONS = ("--clip-norm", "0.1", "--weight-decay", "0.1", "--update-freq", "2")


@pytest.mark.parametrize(
    ("first", "second"), [("adam", "sffn_adam"), ("sffn_adam", "adam"), ("sffn_adam", "sffn_adam")]
)
def test_resume_by_command_line(first, second, data_bin, tmp_path):
    def train_to(updates, folder, optimizer):
        return commands.train(
            data_bin,
            tmp_path / folder,
            "avgk",
            *("--optimizer", optimizer, "--max-update", str(updates), *OPTIONS),
        )

    whole = commands.losses(train_to(6, "whole", "sffn_adam"))
    train_to(3, "parts", first)
    resumed = commands.losses(train_to(6, "parts", second))
    assert list(resumed) == [4, 5, 6]
    for update, loss in resumed.items():
        assert float(loss) == pytest.approx(float(whole[update]), abs=2e-3)
    states = [
        torch.load(tmp_path / folder / "checkpoint_last.pt", weights_only=True)
        for folder in ("whole", "parts")
    ]
    assert states[1]["optimizer_history"][-1]["optimizer_name"] == "FairseqAdam"
    exact = first == second
    for left, right in zip(*(state["model"].values() for state in states), strict=True):
        tolerance = 0 if exact else 1e-3
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
