"""Sharded checkpoints, written by any number of processes and read by any other number."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_sffn.errors import UsageError
from fairseq_sffn.expert_parallel.parts import Part, _cut, put_parts
from fairseq_sffn.expert_parallel.saving import GRACE_SECONDS, remove_unnamed
from fairseq_sffn.tools import cli
from tests import commands
from tests.expert_parallel import launch

FLAGS = (
    *launch.SAME_SENTENCES,
    *("--batch-size", "16", "--required-batch-size-multiple", "1", "--max-update", "8"),
    *("--save-interval-updates", "2", "--keep-interval-updates", "1", "--no-epoch-checkpoints"),
    *("--optimizer", "sffn_adam"),
)


FOLDERS = [f"shards-{update}-{update}2345678" for update in (2, 4, 6)]
"""Names of folders that training writes."""


def flags(world: int, shards: int, updates: int) -> tuple[str, ...]:
    more = ("--batch-size", f"{16 // world}", "--max-update", f"{updates}")
    return (*FLAGS, *more, *(("--sffn-expert-parallel", f"{shards}") if shards > 1 else ()))


def train(
    data: Path, save_dir: Path, world: int, shards: int, updates: int, *more: str
) -> dict[int, str]:
    """Train and return update -> loss."""
    arguments = ("avgk", *flags(world, shards, updates), *more)
    if world == 1:
        return commands.losses(commands.train(data, save_dir, *arguments))
    jobs = {"job": launch.training(data, save_dir, *arguments)}
    return commands.losses(launch.train(world, save_dir.parent / "jobs", jobs)["job"])


def parts(save_dir: Path) -> dict[str, list[str]]:
    folders = [path for path in sorted(save_dir.iterdir()) if path.is_dir()]
    return {f.name: sorted(path.name for path in f.iterdir()) for f in folders}


def assert_near(got: dict[int, str], want: dict[int, str]) -> None:
    assert got.keys() == want.keys()
    for update, loss in want.items():
        assert float(got[update]) == pytest.approx(float(loss), abs=2e-3)


@pytest.fixture(scope="module")
def uninterrupted(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train in one process, and return the losses and the folder of the checkpoints."""
    save_dir = tmp_path_factory.mktemp("uninterrupted") / "saved"
    return train(data_bin, save_dir, 1, 1, 8), save_dir


@pytest.fixture(scope="module")
def in_four(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train two updates in four processes that shard the blocks, and return the losses and the
    folder of the checkpoints."""
    save_dir = tmp_path_factory.mktemp("in_four") / "saved"
    return train(data_bin, save_dir, 4, 4, 2), save_dir


@pytest.fixture
def saved(in_four: Any, tmp_path: Path) -> Path:
    """Copy the folder of the four processes."""
    return Path(shutil.copytree(in_four[1], tmp_path / "saved"))


def whole(path: Path) -> dict[str, Any]:
    """Read model and optimizer of a checkpoint by name, sharded or not."""
    from fairseq import checkpoint_utils

    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    names, optimizer = state["sffn"]["parameters"], state["last_optimizer_state"]["state"]
    return {"model": dict(state["model"]), "optimizer": {names[i]: optimizer[i] for i in optimizer}}


def test_four_then_two_then_one_then_four_of_two(uninterrupted, in_four, saved, data_bin):
    losses = dict(in_four[0])
    assert [len(files) for files in parts(saved).values()] == [4]
    for world, shards, updates in ((2, 2, 4), (1, 1, 6), (4, 2, 8)):
        before = parts(saved)
        losses |= train(data_bin, saved, world, shards, updates)
        now = parts(saved)  # the folders that no checkpoint names any more are gone
        assert before.keys().isdisjoint(now)
        assert [len(files) for files in now.values()] == ([shards] if shards > 1 else [])
        assert not list(saved.glob("**/*.tmp"))
    assert_near(losses, uninterrupted[0])
    want, got = (whole(d / "checkpoint_last.pt") for d in (uninterrupted[1], saved))
    assert got["model"].keys() == want["model"].keys()
    assert got["optimizer"].keys() == want["optimizer"].keys()
    for name, tensor in want["model"].items():
        torch.testing.assert_close(got["model"][name], tensor, rtol=0, atol=0.02)


def test_data_parallel_resumes_without_more_flags(uninterrupted, data_bin, tmp_path):
    saved = tmp_path / "saved"
    losses = train(data_bin, saved, 2, 1, 3) | train(data_bin, saved, 2, 1, 6)
    assert parts(saved) == {}
    losses |= train(data_bin, saved, 1, 1, 8)
    assert_near(losses, uninterrupted[0])


def test_gated_cells_and_shared_blocks(data_bin, tmp_path, capsys):
    """The third table is sharded, shared blocks are not. Two processes, then one, train what one
    trains."""
    more = ("--sffn-glu", "silu", "--sffn-shared-blocks", "2")
    want = train(data_bin, tmp_path / "one", 1, 1, 4, *more)
    saved = tmp_path / "two"
    got = train(data_bin, saved, 2, 2, 2, *more)
    main = torch.load(saved / "checkpoint_last.pt", weights_only=True)
    tables = {name.rpartition(".")[2] for name in main["sffn"]["sharded"]}
    assert tables == {"keys", "key_bias", "up", "up_bias", "values"}
    memory = "decoder.layers.1.fc1.memory"
    assert f"{memory}.shared.up" in main["model"] and f"{memory}.up" not in main["model"]
    cli.main(["reshard", str(saved / "checkpoint_last.pt"), str(tmp_path / "x.pt"), "--shards=3"])
    complete, again = whole(saved / "checkpoint_last.pt"), whole(tmp_path / "x.pt")
    torch.testing.assert_close(again, complete, rtol=0, atol=0)
    assert len(complete["model"][f"{memory}.up"]) == 126 * 8
    got |= train(data_bin, saved, 1, 1, 4, *more)
    assert_near(got, want)


def test_no_file_has_all(saved):
    main = torch.load(saved / "checkpoint_last.pt", weights_only=True)
    complete = whole(saved / "checkpoint_last.pt")
    tables = main["sffn"]["sharded"]
    assert {name.rpartition(".")[2] for name in tables} == {"keys", "key_bias", "values"}
    assert not set(tables) & set(main["model"])
    assert main["model"].keys() | set(tables) == complete["model"].keys()
    for path in saved.glob("shards-*/*.pt"):
        part = torch.load(path, weights_only=True)
        assert set(part["model"]) == set(part["optimizer"]) == set(tables)
        for name, table in part["model"].items():
            assert 4 * len(table) == len(complete["model"][name])
            assert part["optimizer"][name]["exp_avg"].shape == table.shape


def test_there_and_back(saved, uninterrupted, data_bin, tmp_path, capsys):
    """Converting four parts into one file, two parts and four again changes nothing. One process's
    file can be sharded too."""
    original = saved / "checkpoint_last.pt"
    one, two, four = (tmp_path / f"{name}.pt" for name in ("one", "two", "four"))
    cli.main(["reshard", str(original), str(one)])
    cli.main(["reshard", str(one), str(two), "--shards", "2"])
    cli.main(["reshard", str(two), str(four), "--shards", "4"])
    for path, shards in ((two, 2), (four, 4)):
        folder = next(tmp_path.glob(f"resharded-{path.stem}-*"))
        assert parts(tmp_path)[folder.name] == [
            f"part{i + 1}-of-{shards}.pt" for i in range(shards)
        ]
    want = whole(original)
    for path in (one, two, four):
        torch.testing.assert_close(whole(path), want, rtol=0, atol=0)
    assert "sffn" in torch.load(one, weights_only=True)
    values = {commands.evaluate(data_bin, path) for path in (original, one, two, four)}
    assert len(values) == 1
    by_one = uninterrupted[1] / "checkpoint_last.pt"
    cli.main(["reshard", str(by_one), str(tmp_path / "parts.pt"), "--shards", "4"])
    torch.testing.assert_close(whole(tmp_path / "parts.pt"), whole(by_one), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("OUT.bin", "--shards", "2"), "OUT.bin: must end in .pt"),
        (("OUT.pt", "--shards", "3"), "--shards 3: does not divide the 64 blocks of a layer"),
        (("OUT", "--shards", "0"), "--shards 0: must be at least 1"),
        (("checkpoint_last.pt",), "is there already"),
        (("nowhere/OUT",), "nowhere/OUT: there is no folder"),
        (("/proc/OUT",), "checkpoint /proc/OUT: not written: "),
        (("/proc/OUT.pt", "--shards", "2"), "checkpoint /proc/resharded-OUT-.*: not written: "),
    ],
)
def test_what_reshard_refuses(arguments, message, saved):
    path, *rest = arguments
    with pytest.raises(UsageError, match=message):
        cli.main(["reshard", str(saved / "checkpoint_last.pt"), str(saved / path), *rest])
    assert not list(saved.glob("OUT*"))


@pytest.mark.parametrize("command", ["eval-lm", "train", "reshard"])
@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "swapped", "another", "alien", "list"]
)
def test_a_part_that_cannot_be_read_is_named(damage, command, saved, data_bin, tmp_path):
    part = next(saved.glob("shards-*/part3-of-4.pt"))
    if damage == "missing":
        part.unlink()
    elif damage == "truncated":
        part.write_bytes(part.read_bytes()[:1000])
    elif damage == "flipped":  # flip a bit of a tensor
        table = next(iter(torch.load(part, weights_only=True)["model"].values()))
        content = bytearray(part.read_bytes())
        content[content.index(table.numpy().tobytes()) + 9] ^= 4
        part.write_bytes(content)
    elif damage == "swapped":
        part.write_bytes(b"no checkpoint")
    elif damage == "another":
        shutil.copy(part.with_name("part2-of-4.pt"), part)
    elif damage == "alien":  # a part with the same shapes
        state = torch.load(part, weights_only=True)
        torch.save({**state, "folder": "shards-9-abc"}, part)
    else:
        torch.save([1], part)
    last = saved / "checkpoint_last.pt"
    with pytest.raises(UsageError, match=r"part3-of-4\.pt") as caught:
        if command == "train":
            train(data_bin, saved, 1, 1, 4)
        elif command == "eval-lm":
            commands.evaluate(data_bin, last)
        else:
            cli.main(["reshard", str(last), str(tmp_path / "out.pt")])
    assert "\n" not in str(caught.value)


def test_folders_are_kept_beside_what_cannot_be_read(tmp_path):
    for name in (*FOLDERS, "shards-of-glass", "resharded-mine"):
        (tmp_path / name).mkdir()
    torch.save({"sffn": {"folder": FOLDERS[0]}}, tmp_path / "one.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "other.pt").write_bytes(b"what is this?")
    remove_unnamed(tmp_path)
    assert len(parts(tmp_path)) == 5
    (tmp_path / "other.pt").unlink()
    remove_unnamed(tmp_path)
    assert list(parts(tmp_path)) == ["resharded-mine", FOLDERS[0], "shards-of-glass"]


def test_young_folders_of_reshard_are_kept(tmp_path):
    """A checkpoint may be about to name them."""
    names = [f"resharded-m-{i}2345678" for i in range(3)]
    for name in names:
        (tmp_path / name).mkdir()
    torch.save({"sffn": {"folder": names[1]}}, tmp_path / "m.pt")
    old = time.time() - GRACE_SECONDS - 1
    for name in names[1:]:
        os.utime(tmp_path / name, (old, old))
    remove_unnamed(tmp_path)
    assert list(parts(tmp_path)) == names[:2]


def test_training_survives_a_folder_that_cannot_be_removed(tmp_path, caplog):
    *others, link = FOLDERS
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / link).symlink_to(tmp_path / others[0])  # rmtree refuses links
    remove_unnamed(tmp_path)
    assert not any((tmp_path / name).exists() for name in others)
    assert f"{tmp_path / link}: not removed: " in caplog.text


def test_what_is_cut_shares_no_memory_with_the_files():
    """The files are mapped and may be removed. Neither cut tensors nor the others may refer to
    them."""
    table = torch.ones(4, 2)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 2), "count": 3}
    own = _cut([state], [table], Part())
    assert own["count"] == 3
    for name in ("step", "exp_avg"):
        torch.testing.assert_close(own[name], state[name])
        assert own[name].data_ptr() != state[name].data_ptr()


def in_one_piece(path: Path) -> None:
    """Flatten the optimizer's state into one tensor, as --fp16 does."""
    state = torch.load(path, weights_only=True)
    group = {**state["last_optimizer_state"]["param_groups"][0], "params": [0]}
    state["last_optimizer_state"] = {"state": {}, "param_groups": [group]}
    torch.save(state, path)


def test_resetting_the_optimizer_needs_no_state(uninterrupted, data_bin, tmp_path):
    """A flattened state would otherwise prevent loading in two processes."""
    saved = Path(shutil.copytree(uninterrupted[1], tmp_path / "saved"))
    last = saved / "checkpoint_last.pt"
    in_one_piece(last)
    with pytest.raises(UsageError, match="add --reset-optimizer"):
        put_parts(torch.load(last, weights_only=True), last, Part(0, 2))
    arguments = ("avgk", *flags(2, 2, 2))
    # Without --reset-lr-scheduler and similar flags, the epoch of the checkpoint continues.
    jobs = {
        "reset": launch.training(
            *(data_bin, tmp_path / "reset", *arguments, "--reset-optimizer"),
            *("--restore-file", str(last), "--reset-dataloader", "--reset-meters"),
        ),
        "finetune": launch.training(
            data_bin, tmp_path / "finetune", *arguments, "--finetune-from-model", str(last)
        ),
    }
    for log in launch.train(2, tmp_path / "jobs", jobs).values():
        assert list(commands.losses(log)) == [1, 2]


def test_parts_do_not_become_one_piece(saved):
    """--fp16 without --fp16-no-flatten-grads needs a flattened state, and PyTorch would not report
    the difference."""
    last = saved / "checkpoint_last.pt"
    with pytest.raises(UsageError, match="wants one piece; add that, or --reset-optimizer"):
        put_parts(torch.load(last, weights_only=True), last, Part(flat=True))
    put_parts(torch.load(last, weights_only=True), last, Part(flat=True, reset_optimizer=True))


def test_training_goes_on_from_a_checkpoint_of_old_pytorch(uninterrupted, data_bin, tmp_path):
    saved = tmp_path / "saved"
    losses = train(data_bin, saved, 1, 1, 4)
    state = torch.load(saved / "checkpoint_last.pt", weights_only=True)
    torch.save(state, saved / "checkpoint_last.pt", _use_new_zipfile_serialization=False)
    (saved / FOLDERS[0]).mkdir()  # training looks into the checkpoint because of it
    assert_near(losses | train(data_bin, saved, 1, 1, 8), uninterrupted[0])
    assert parts(saved) == {}


def test_a_link_to_a_checkpoint_in_parts(saved, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "best.pt"
    link.symlink_to(saved / "checkpoint_last.pt")
    torch.testing.assert_close(whole(link), whole(saved / "checkpoint_last.pt"), rtol=0, atol=0)


def test_resetting_the_optimizer_reads_none_of_the_parts(saved):
    last = saved / "checkpoint_last.pt"
    state = torch.load(last, weights_only=True)
    put_parts(state, last, Part(reset_optimizer=True))
    assert state["last_optimizer_state"] is None
    assert set(state["sffn"]["sharded"]) <= state["model"].keys()
