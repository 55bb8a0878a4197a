"""``sffn_adam`` against fairseq's ``adam``: the same updates, the same checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.optim import OPTIMIZER_REGISTRY, FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq.optim.adam import Adam, FairseqAdam
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from fairseq_sffn.errors import UsageError
from fairseq_sffn.optim.sffn_adam import FusedAdam
from tests import commands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {
    torch.float64: dict(rtol=1e-12, atol=1e-14),
    torch.float32: dict(rtol=1e-6, atol=1e-6),
    # The fp32 results round to the same number or to its neighbour.
    torch.bfloat16: dict(rtol=2**-7, atol=1e-6),
    torch.float16: dict(rtol=2**-10, atol=1e-6),
}
SETTINGS: list[dict[str, Any]] = [
    dict(),
    dict(weight_decay=0.1),
    dict(betas=(0.9, 0.98), eps=1e-6),
    dict(betas=(0.5, 0.6), eps=0.1, weight_decay=0.01),  # a large eps matters
    dict(betas=(0.0, 0.999), eps=0.0),
    dict(amsgrad=True),
    dict(amsgrad=True, betas=(0.5, 0.6), eps=0.1, weight_decay=0.01),
]


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    """Make parameters of several shapes, one transposed and one a part of a larger tensor."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 4), (7,), (), (0, 3), (3, 2, 2), (4, 3), (4, 6)]
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    tensors[-2], tensors[-1] = tensors[-2].t(), tensors[-1][:, :3]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def give_gradients(tensors: Iterable[Tensor], step: int, skip: bool = True) -> None:
    """Set random gradients of any scale. Some tensors sometimes get none."""
    generator = torch.Generator().manual_seed(step)
    for number, tensor in enumerate(tensors):
        grad = torch.randn(tensor.shape, generator=generator) * 10.0 ** -(step % 4)
        absent = skip and (step + number) % 3 == 0
        tensor.grad = None if absent else grad.to(tensor)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int], skip: bool = True) -> None:
    """Update with a learning rate that changes, times the group's own."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group.get("own_lr", 1.0) * 0.01 / (1 + step)
            give_gradients(group["params"], step, skip)
        optimizer.step()


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **TOLERANCES[b.dtype])


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two state dicts."""
    assert actual["state"].keys() == expected["state"].keys()
    for number, reference in expected["state"].items():
        state = actual["state"][number]
        assert state.keys() == reference.keys()
        assert type(state["step"]) is int and state["step"] == reference["step"]
        names = sorted(reference.keys() - {"step"})
        assert_same([state[name] for name in names], [reference[name] for name in names])
    assert actual["param_groups"] == expected["param_groups"]


# The update


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_updates_are_those_of_fairseq(
    settings: dict[str, Any], skip: bool, dtype: torch.dtype
) -> None:
    ours, theirs, start = parameters(dtype), parameters(dtype), parameters(dtype)
    optimizers = FusedAdam(ours, **settings), Adam(theirs, **settings)
    for optimizer in optimizers:
        train(optimizer, range(30), skip)
    assert_same(ours, theirs)
    assert not torch.allclose(ours[0], start[0], rtol=0, atol=1e-3)
    assert_same_state(*(optimizer.state_dict() for optimizer in optimizers))


def test_what_is_no_parameter_stays_as_it_is() -> None:
    """This holds even between the numbers of one parameter."""
    table = torch.zeros(4, 6)
    part = torch.nn.Parameter(table[:, :3])
    part.grad = torch.ones(4, 3)
    FusedAdam([part]).step()
    assert table[:, :3].all() and not table[:, 3:].any()
    assert torch.equal(part.grad, torch.ones(4, 3))


def test_groups_have_their_own_settings() -> None:
    results = []
    for kind in (FusedAdam, Adam):
        tensors = parameters()
        groups = [
            dict(params=tensors[:2], own_lr=3.0, weight_decay=0.2),
            dict(params=[]),
            dict(params=tensors[2:4], betas=(0.8, 0.9), eps=1e-3),
            dict(params=tensors[4:], amsgrad=True),
        ]
        train(kind(groups), range(10))
        results.append(tensors)
    assert_same(*results)


@pytest.mark.parametrize(("first", "second"), [(Adam, FusedAdam), (FusedAdam, Adam)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_either_goes_on_from_the_other(
    first: type[Adam], second: type[Adam], dtype: torch.dtype, amsgrad: bool
) -> None:
    whole, parts = parameters(dtype), parameters(dtype)
    optimizer = first(whole, weight_decay=0.1, amsgrad=amsgrad)
    train(optimizer, range(5))
    for target, source in zip(parts, whole, strict=True):
        target.data.copy_(source.data)
    resumed = second(parts)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for adam in (optimizer, resumed):
        train(adam, range(5, 10))
    assert_same(parts, whole)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


def test_no_gradients_change_nothing() -> None:
    tensors = parameters()
    optimizer = FusedAdam(tensors, weight_decay=0.1)
    assert optimizer.step(lambda: 7) == 7
    assert all(torch.equal(a, b) for a, b in zip(tensors, parameters(), strict=True))
    assert not optimizer.state


def test_closure_has_gradients() -> None:
    tensors = parameters()[:1]

    def closure() -> Tensor:
        loss = tensors[0].square().sum()
        loss.backward()
        return loss

    FusedAdam(tensors).step(closure)
    assert not torch.equal(tensors[0], parameters()[0])


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Parameter(torch.randn(4, 3))
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (4, 3))
    with pytest.raises(RuntimeError, match="sparse gradients"):
        FusedAdam([table]).step()


# In fairseq


def config(**changes: Any) -> SimpleNamespace:
    options = dict(lr=[0.1], adam_betas="(0.9, 0.98)", adam_eps=1e-8, weight_decay=0.0)
    return SimpleNamespace(**(options | changes))


def test_steps_of_a_group_are_taken_over() -> None:
    """apex's Adam, which fairseq uses on a GPU if it is installed, stores them like this."""
    ours, theirs = parameters(), parameters()
    optimizer = Adam(theirs)
    train(optimizer, range(4), skip=False)
    for target, source in zip(ours, theirs, strict=True):
        target.data.copy_(source.data)
    state = copy.deepcopy(optimizer.state_dict())
    steps = {of_parameter.pop("step") for of_parameter in state["state"].values()}
    assert steps == {4}
    state["param_groups"][0]["step"] = 4
    resumed = FusedAdam(ours)
    resumed.load_state_dict(state)
    for each in (optimizer, resumed):
        train(each, range(4, 8))
    assert_same(ours, theirs)


def test_what_fairseq_builds() -> None:
    optimizer = OPTIMIZER_REGISTRY["sffn_adam"](config(weight_decay=0.3), parameters())
    assert isinstance(optimizer, FairseqAdam) and type(optimizer) is not FairseqAdam
    assert type(optimizer.optimizer) is FusedAdam
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.9, 0.98), 0.3)
    assert optimizer.supports_memory_efficient_fp16 and optimizer.supports_flat_params


def mixed_precision(kind: type, name: str, dtype: torch.dtype, tensors: list[Any]) -> Any:
    """Build the optimizer as fairseq does for ``--fp16`` or ``--bf16``."""
    cfg = OmegaConf.structured(FairseqConfig)
    with open_dict(cfg):
        cfg.optimizer = {"_name": name, "weight_decay": 0.1}
        add_defaults(cfg)
    cfg.common.bf16 = dtype == torch.bfloat16
    cfg.optimization.lr = [0.01]
    return kind.build_optimizer(cfg, tensors)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (MemoryEfficientFP16Optimizer, torch.float16),
        (MemoryEfficientFP16Optimizer, torch.bfloat16),
        (FP16Optimizer, torch.bfloat16),  # without CUDA, fp16 is refused
    ],
)
@pytest.mark.parametrize(
    ("first", "second"), [("adam", "sffn_adam"), ("sffn_adam", "adam"), ("sffn_adam", "sffn_adam")]
)
def test_mixed_precision(kind: type, dtype: torch.dtype, first: str, second: str) -> None:
    """The optimizers are exchanged in the middle."""

    def train_mixed(first: str, second: str) -> tuple[list[Any], dict[str, Any]]:
        tensors = parameters(dtype)
        optimizer = mixed_precision(kind, first, dtype, tensors)
        for step in range(10):
            if step == 5:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = mixed_precision(kind, second, dtype, tensors)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            optimizer.set_lr(0.01 / (1 + step))
            give_gradients(tensors, step)
            optimizer._needs_sync = True  # as in backward()
            optimizer.multiply_grads(0.5)
            optimizer.clip_grad_norm(1.0)
            optimizer.step()
        return tensors, optimizer.state_dict()

    actual, expected = train_mixed(first, second), train_mixed("adam", "adam")
    assert_same(actual[0], expected[0])
    assert_same_state(actual[1], expected[1])


REFUSED = [
    *("--use-old-adam", "--fp16-adam-stats"),
    *("--adam-betas (0.9,1.0)", "--adam-betas (-0.1,0.9)"),
    *("--adam-betas 0.9", "--adam-betas nonsense", "--adam-betas (0.9,)", "--adam-betas (.9"),
]


@pytest.mark.parametrize("flag", REFUSED)
def test_refused_flags(flag: str, data_bin: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{flag.split()[0]}.*: [^\n]+$"):
        train_lm(data_bin, tmp_path, "sffn_adam", 1, *flag.split())
    assert not list(tmp_path.iterdir())


def test_tpu_is_refused() -> None:
    """On a machine with a TPU. Without one, the trainer fails earlier."""
    with pytest.raises(UsageError, match=r"^--tpu: .* use --optimizer adam$"):
        OPTIMIZER_REGISTRY["sffn_adam"](config(tpu=True), parameters())


OPTIONS = (
    *("--clip-norm", "0.1", "--weight-decay", "0.1", "--update-freq", "2", "--adam-eps", "1e-5"),
    *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4", "--decoder-layerdrop", "0.5"),
)


def train_lm(data: Path, save_dir: Path, optimizer: str, updates: int, *flags: str) -> list[int]:
    """Train and return the numbers of the updates."""
    flags = ("--optimizer", optimizer, "--max-update", f"{updates}", *OPTIONS, *flags)
    return list(commands.losses(commands.train(data, save_dir, "avgk", *flags)))


def checkpoint(save_dir: Path) -> dict[str, Any]:
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return optimizer -> final checkpoint of a training without a stop."""
    result = {}
    for optimizer in ("adam", "sffn_adam"):
        save_dir = tmp_path_factory.mktemp(optimizer)
        assert train_lm(data_bin, save_dir, optimizer, 6) == [1, 2, 3, 4, 5, 6]
        result[optimizer] = checkpoint(save_dir)
    return result


def test_trains_as_adam_does(whole: dict[str, dict[str, Any]]) -> None:
    """A layer that LayerDrop sometimes left out has made fewer steps."""
    states = whole["sffn_adam"]["last_optimizer_state"]["state"]
    assert len({state["step"] for state in states.values()}) > 1
    assert_same_training(whole["sffn_adam"], whole["adam"])


@pytest.mark.parametrize(("first", "second"), [("adam", "sffn_adam"), ("sffn_adam", "adam")])
def test_either_resumes_the_other(
    first: str, second: str, whole: dict[str, dict[str, Any]], data_bin: Path, tmp_path: Path
) -> None:
    train_lm(data_bin, tmp_path, first, 3)
    assert train_lm(data_bin, tmp_path, second, 6) == [4, 5, 6]
    assert_same_training(checkpoint(tmp_path), whole["adam"])


def test_resume_is_exact(whole: dict[str, dict[str, Any]], data_bin: Path, tmp_path: Path) -> None:
    train_lm(data_bin, tmp_path, "sffn_adam", 3)
    assert train_lm(data_bin, tmp_path, "sffn_adam", 6) == [4, 5, 6]
    actual, expected = checkpoint(tmp_path), whole["sffn_adam"]
    for part in ("model", "last_optimizer_state"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0)


def assert_same_training(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two runs that differ in rounding, which Adam's division by small gradients
    enlarges."""
    for run in (actual, expected):
        assert run["optimizer_history"][-1]["optimizer_name"] == "FairseqAdam"
    torch.testing.assert_close(actual["model"], expected["model"], rtol=1e-5, atol=1e-5)
    states = [run["last_optimizer_state"]["state"] for run in (actual, expected)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-9)
