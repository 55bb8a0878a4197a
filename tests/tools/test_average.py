"""The mean of checkpoints, sharded or not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sffn.errors import UsageError
from tests import commands

UPDATES = (2, 4, 6)


@pytest.fixture(scope="module", params=["avgk", "rand_hash", "dense"])
def trained(
    request: pytest.FixtureRequest, data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train checkpoints and return their folder."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ("--save-interval-updates", "2", "--store-ema", "--avgk-center")
    commands.train(data_bin, folder, request.param, *flags[: 4 if request.param == "avgk" else 3])
    return folder


def checkpoints(folder: Path) -> list[Path]:
    return [folder / f"checkpoint_1_{updates}.pt" for updates in UPDATES]


def model(path: Path) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, sharded or not."""
    return dict(checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"])


def mean(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Compute the mean by a plain sum in double precision. Integers come from the last
    checkpoint."""
    models = [model(path) for path in paths]
    return {
        name: sum(each[name].double() for each in models).div(len(models)).to(tensor.dtype)  # type: ignore[union-attr]
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[-1].items()
    }


def test_mean_of_whole_checkpoints(trained: Path, data_bin: Path, tmp_path: Path) -> None:
    paths = checkpoints(trained)
    out = tmp_path / "mean.pt"
    assert commands.sffn("average", *paths, out) == f"{out}: mean of 3 checkpoints\n"
    torch.testing.assert_close(model(out), mean(paths), rtol=0, atol=0)
    state = torch.load(out, weights_only=True)
    newest = torch.load(paths[-1], weights_only=True)
    assert state["optimizer_history"] == newest["optimizer_history"]
    assert state["last_optimizer_state"] is None and "ema" not in state["extra_state"]
    assert state["model"]._metadata == newest["model"]._metadata
    values = [commands.evaluate(data_bin, path) for path in (*paths, out)]
    assert values[-1] < values[0]


def test_order_is_of_no_matter(trained: Path, tmp_path: Path) -> None:
    paths = checkpoints(trained)
    commands.sffn("average", *paths, tmp_path / "mean.pt")
    commands.sffn("average", *paths[::-1], tmp_path / "other.pt")
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("mean", "other"))
    torch.testing.assert_close(dict(first["model"]), dict(second["model"]), rtol=0, atol=0)
    assert first["optimizer_history"] == second["optimizer_history"]


def test_mean_of_itself_is_itself(trained: Path, tmp_path: Path) -> None:
    path, *_ = checkpoints(trained)
    copies = [Path(shutil.copy(path, tmp_path / f"copy{i}.pt")) for i in range(3)]
    commands.sffn("average", *copies, tmp_path / "mean.pt")
    torch.testing.assert_close(model(tmp_path / "mean.pt"), model(path), rtol=0, atol=0)


def in_parts(paths: list[Path], folder: Path, shards: int) -> list[Path]:
    made = [folder / path.name for path in paths]
    for path, part in zip(paths, made, strict=True):
        commands.sffn("reshard", path, part, "--shards", shards)
    return made


def test_mean_of_checkpoints_in_parts(trained: Path, data_bin: Path, tmp_path: Path) -> None:
    """Any numbers of parts give the same mean, in one file or in parts."""
    if trained.name.startswith("dense"):
        pytest.skip("has no parts")
    paths = checkpoints(trained)
    (tmp_path / "two").mkdir()
    (tmp_path / "four").mkdir()
    two, four = in_parts(paths, tmp_path / "two", 2), in_parts(paths, tmp_path / "four", 4)
    want = mean(paths)
    for number, (given, shards) in enumerate(
        ((two, 1), (two, 4), ([paths[0], two[1], four[2]], 2))
    ):
        out = tmp_path / f"mean{number}.pt"
        commands.sffn("average", *given, out, "--shards", shards)
        torch.testing.assert_close(model(out), want, rtol=0, atol=0)
    assert len(list(tmp_path.glob("resharded-mean1-*/part*-of-4.pt"))) == 4
    values = {commands.evaluate(data_bin, tmp_path / f"mean{i}.pt") for i in range(3)}
    assert len(values) == 1


def test_checkpoints_of_fairseq_itself(trained: Path, tmp_path: Path) -> None:
    """Their parameters have no names, which only sharded checkpoints need."""
    stock = []
    for path in checkpoints(trained):
        state = torch.load(path, weights_only=True)
        del state["sffn"]
        torch.save(state, tmp_path / path.name)
        stock.append(tmp_path / path.name)
    commands.sffn("average", *stock, out := tmp_path / "mean.pt")
    torch.testing.assert_close(model(out), mean(stock), rtol=0, atol=0)
    with pytest.raises(UsageError, match="does not tell its parameters' names"):
        commands.sffn("average", *stock, tmp_path / "parts.pt", "--shards", "2")


def test_what_is_not_finite(trained: Path, tmp_path: Path) -> None:
    first, second, _ = checkpoints(trained)
    state = torch.load(first, weights_only=True)
    state["model"]["decoder.layers.0.fc1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UsageError, match=r"decoder\.layers\.0\.fc1\.weight is not finite"):
        commands.sffn("average", tmp_path / "nan.pt", second, tmp_path / "mean.pt")


def test_a_link_is_the_same_checkpoint(trained: Path, tmp_path: Path) -> None:
    first, *_ = checkpoints(trained)
    (tmp_path / "soft.pt").symlink_to(first)
    with pytest.raises(UsageError, match="names a checkpoint twice"):
        commands.sffn("average", first, tmp_path / "soft.pt", tmp_path / "mean.pt")


# fairseq's scripts/average_checkpoints.py and similar programs


def sum_and_divide(paths: list[Path], out: Path) -> None:
    """Compute the mean as such programs do: in the tensors' dtypes, from one file each."""
    states = [torch.load(path, weights_only=True) for path in paths]
    for name, total in states[0]["model"].items():
        for state in states[1:]:
            total += state["model"][name]
        if total.is_floating_point():
            total.div_(len(states))
        else:
            total //= len(states)
    torch.save(states[0], out)


def test_parts_that_are_left_behind_are_noticed(
    trained: Path, data_bin: Path, tmp_path: Path
) -> None:
    if trained.name.startswith("dense"):
        pytest.skip("has no parts")
    paths = in_parts(checkpoints(trained), tmp_path, 2)
    sum_and_divide(paths, out := tmp_path / "mean.pt")
    for use in uses(data_bin, out):
        with pytest.raises(UsageError, match="changed after it was written, and its parts in"):
            use()


def test_hash_tables_that_are_ruined_are_noticed(data_bin: Path, tmp_path: Path) -> None:
    """A sum of three tables in int16 overflows."""
    flags = ("--sffn-block-size", "1", "--sffn-expansion", "512", "--sffn-active-blocks", "4")
    flags = (*flags, "--save-interval-updates", "2", "--max-update", "6")
    commands.train(data_bin, tmp_path, "rand_hash", *flags)
    paths = checkpoints(tmp_path)
    tables = [torch.load(paths[0], weights_only=True)["model"]]
    assert any(tensor.dtype == torch.int16 for tensor in tables[0].values())
    sum_and_divide(paths, out := tmp_path / "mean.pt")
    for use in uses(data_bin, out):
        with pytest.raises(UsageError, match="integer buffers, such as hash tables, were changed"):
            use()


def test_a_mean_of_whole_checkpoints_by_others_is_welcome(
    trained: Path, data_bin: Path, tmp_path: Path
) -> None:
    """Such a mean is accepted if nothing is ruined."""
    sum_and_divide(checkpoints(trained)[:2], out := tmp_path / "mean.pt")
    commands.evaluate(data_bin, out)


def uses(data: Path, checkpoint: Path) -> list[Callable[[], Any]]:
    """Return functions that use a checkpoint."""
    return [
        lambda: commands.evaluate(data, checkpoint),
        lambda: commands.sffn("reshard", checkpoint, checkpoint.with_name("whole.pt")),
        lambda: commands.sffn(
            "average",
            checkpoint,
            checkpoint.with_name("checkpoint_1_2.pt"),
            checkpoint.with_name("another.pt"),
        ),
        lambda: commands.train(
            *(data, checkpoint.parent / "run", "rand_hash", "--finetune-from-model", checkpoint)
        ),
    ]


# Checkpoints that cannot be averaged


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--decoder-layers", "3"), "only one of them has decoder.layers.2."),
        (("--sffn-expansion", "8"), r"memory\.\w+ is \[256, 16\] and \[512, 16\]"),
        (("--seed", "2"), "selector.table differs, as in models of different seeds"),
    ],
)
def test_other_models(flags: tuple[str, ...], message: str, data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path / "one", "rand_hash", "--max-update", "1")
    commands.train(data_bin, tmp_path / "two", "rand_hash", "--max-update", "2", *flags)
    pair = [tmp_path / name / "checkpoint_last.pt" for name in ("two", "one")]
    with pytest.raises(UsageError, match=rf"cannot be averaged: .*{message}"):
        commands.sffn("average", *pair, tmp_path / "mean.pt")
    assert not (tmp_path / "mean.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("A", "OUT"), "give two checkpoints or more"),
        (("A", "A", "OUT"), "names a checkpoint twice"),
        (("A", "nowhere.pt", "OUT"), r"nowhere\.pt: there is no such file"),
        (("A", "B", "A"), "is there already"),
        (("A", "B", "nowhere/OUT"), "there is no folder"),
        (("A", "B", "OUT", "--shards", "0"), "--shards 0: must be at least 1"),
        (("A", "B", "OUT.pt", "--shards", "3"), "--shards 3: does not divide"),
    ],
)
def test_wrong_input(
    words: tuple[str, ...], message: str, data_bin: Path, tmp_path: Path, averaged: Path
) -> None:
    names = {"A": averaged / "checkpoint_1_2.pt", "B": averaged / "checkpoint_1_4.pt"}
    given = [word if word.startswith("-") or word.isdigit() else tmp_path / word for word in words]
    given = [names.get(word, path) for word, path in zip(words, given, strict=True)]
    with pytest.raises(UsageError, match=message):
        commands.sffn("average", *given)


@pytest.fixture(scope="module")
def averaged(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    commands.train(data_bin, folder, "avgk", "--save-interval-updates", "2", "--max-update", "4")
    return folder
