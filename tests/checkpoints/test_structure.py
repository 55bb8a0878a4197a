"""A checkpoint with unexpected contents is refused in one line."""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sffn.checkpoints.structure import CHECKPOINT, METERS, Record, find_problem
from fairseq_sffn.errors import UsageError
from tests import commands

ODD: tuple[Any, ...] = (None, 3, -1, 0.5, True, "word", [], [1], [{}], {}, {"a": 1}, {1: 2})

MORE = ("--max-update", "2", "--no-epoch-checkpoints")
"""Flags to train an update more."""


@pytest.fixture(scope="module")
def saved(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    commands.train(data_bin, folder, "rand_hash", "--max-update", "1", "--no-epoch-checkpoints")
    return folder / "checkpoint_last.pt"


def test_meters_are_fairseqs() -> None:
    assert {"AverageMeter", "SumMeter", "TimeMeter", "StopwatchMeter"} <= METERS
    assert not {"OrderedDict", "safe_round", "type_as", "print"} & METERS


def test_real_checkpoints_fit(saved: Path) -> None:
    assert find_problem(torch.load(saved, weights_only=True), CHECKPOINT) is None


def entries(kind: Record, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every described entry."""
    for name, of in {**kind.required, **kind.optional}.items():
        yield (*where, name)
        if isinstance(of, Record):
            yield from entries(of, (*where, name))


def changed(state: Any, where: tuple[str, ...], value: Any) -> Any:
    """Copy a checkpoint with another value at one place, or without an entry."""
    state = copy.copy(state)
    name, *rest = where
    if rest:
        state[name] = changed(state.get(name, {}), tuple(rest), value)
    elif value is DELETED:
        state.pop(name, None)
    else:
        state[name] = value
    return state


DELETED = object()


def refusal(use: Callable[[], Any]) -> str | None:
    """Return the line that a use ends with; ``None`` if it works."""
    try:
        use()
    except UsageError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("where", [(), *entries(CHECKPOINT)], ids="-".join)
def test_odd_values(where: tuple[str, ...], saved: Path, data_bin: Path, tmp_path: Path) -> None:
    """Replace or remove every described entry. Loading works or ends in one line. So does training
    with values that loading accepts, and with the first value that it refuses."""
    state = torch.load(saved, weights_only=True)
    path = tmp_path / "checkpoint_last.pt"
    tried = set()
    for value in (*ODD, torch.ones(2), argparse.Namespace(), DELETED):
        odd = changed(state, where, value) if where else value
        if odd is DELETED:
            continue
        problem = find_problem(odd, CHECKPOINT)
        expected = f"checkpoint {path}: not a checkpoint of fairseq: {problem}"
        torch.save(odd, path)
        line = refusal(
            lambda: checkpoint_utils.load_model_ensemble_and_task(
                [str(path)], {"data": str(data_bin)}
            )
        )
        assert problem is None or line == expected
        if (problem is None) not in tried:
            tried.add(problem is None)
            line = refusal(lambda: commands.train(data_bin, tmp_path, "rand_hash", *MORE))
            assert problem is None or line == expected


@pytest.mark.parametrize(
    "meter", [(1, "key", "OrderedDict", {}), (1, "key", ["a"], {}), (None, "key", "SumMeter", {})]
)
def test_meter_of_a_checkpoint_is_a_meter(
    meter: Any, saved: Path, data_bin: Path, tmp_path: Path
) -> None:
    """fairseq looks up the class by the name in the checkpoint."""
    state = torch.load(saved, weights_only=True)
    state["extra_state"]["metrics"]["default"][0] = meter
    path = tmp_path / "checkpoint_last.pt"
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"extra_state\.metrics\.default\[0\] is not a meter"):
        commands.train(data_bin, tmp_path, "rand_hash", "--max-update", "2")


@pytest.mark.parametrize(
    "odd",
    [None, 3, torch.ones(2), {"exp_avg": None}, {"exp_avg": torch.ones(2), "exp_avg_sq": 0.5}],
)
def test_state_of_a_parameter(odd: Any, saved: Path, data_bin: Path, tmp_path: Path) -> None:
    state = torch.load(saved, weights_only=True)
    state["last_optimizer_state"]["state"][0] = odd
    torch.save(state, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UsageError, match=r"last_optimizer_state\.state is not a dictionary of"):
        commands.train(data_bin, tmp_path, "rand_hash", *MORE)


def test_what_fairseq_finds_is_told_in_a_line(saved: Path, data_bin: Path, tmp_path: Path) -> None:
    state = torch.load(saved, weights_only=True)
    del state["last_optimizer_state"]["param_groups"][0]["params"][0]
    torch.save(state, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UsageError, match=r"checkpoint_last\.pt: training cannot go on from it: "):
        commands.train(data_bin, tmp_path, "rand_hash", *MORE)
    torch.save(torch.load(saved, weights_only=True), tmp_path / "checkpoint_last.pt")
    with pytest.raises(UsageError, match="Optimizer does not match; please reset the optimizer"):
        commands.train(data_bin, tmp_path, "rand_hash", *MORE, "--optimizer", "nag")
