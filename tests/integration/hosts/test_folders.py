"""Two hosts whose folder of checkpoints is shown late, or is not the same folder."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from tests import commands
from tests.expert_parallel import launch
from tests.integration.hosts.jobs import FLAGS, TRAIN, Job, losses
from tests.integration.hosts.network import Host

SHARDED = ("--sffn-expert-parallel", "4")


class SlowCopy(threading.Thread):
    """Copies new files from one folder to another, as a slow network file system shows them.

    Args:
        source, target: the folders.
        pattern: which files.
        seconds: age of a file when it appears. Its second half comes as much later.
    """

    def __init__(self, source: Path, target: Path, pattern: str, seconds: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.source, self.target, self.pattern, self.seconds = source, target, pattern, seconds
        self.ended, self.copied = threading.Event(), set[str]()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            for path in sorted(self.source.rglob(self.pattern)):
                self.copy(path)

    def copy(self, path: Path) -> None:
        """Copy a file once."""
        name = str(path.relative_to(self.source))
        if name in self.copied or path.suffix == ".tmp" or not path.is_file():
            return
        time.sleep(self.seconds)
        self.copied.add(name)
        try:
            content = path.read_bytes()
        except OSError:  # it was removed meanwhile
            return
        target = self.target / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content[: len(content) // 2])
        time.sleep(self.seconds)
        target.write_bytes(content)


@pytest.fixture(scope="module")
def saved(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two updates on one host."""
    folder = tmp_path_factory.mktemp("saved")
    job = launch.training(data_bin, folder / "saved", "avgk", *FLAGS, *SHARDED, "--max-update", "2")
    launch.train(4, folder / "jobs", {"job": job})
    return folder / "saved"


def start(hosts: list[Host], data: Path, folder: Path, *flags: str) -> Job:
    """Train for two more updates, where the second host has its own folder."""
    arguments = launch.training(data, folder / "saved", "avgk", *FLAGS, *flags, "--max-update", "4")
    (folder / "own").mkdir(exist_ok=True)
    binds = {"host2": {str(folder / "saved"): str(folder / "own")}}
    return Job(folder / "logs", hosts, TRAIN, *arguments, binds=binds)


def test_files_that_the_other_host_sees_late(
    saved: Path, hosts: list[Host], data_bin: Path, tmp_path: Path
) -> None:
    """Each host waits for the files of the other. Then one of them never comes."""
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "own").mkdir()
    copies = [
        SlowCopy(tmp_path / "saved", tmp_path / "own", "*"),
        SlowCopy(tmp_path / "own", tmp_path / "saved", "part[34]-*"),
    ]
    for copy in copies:
        copy.start()
    flags = (*SHARDED, "--peer-timeout", "60", "--save-interval-updates", "1")
    job = start(hosts, data_bin, tmp_path, *flags)
    for host in hosts:
        assert job.wait(host) == 0, job.said(host)[-4000:]
    for copy in copies:
        copy.ended.set()
        copy.join()
    assert sorted(losses(job.said(hosts[0]))) == [3, 4]
    assert commands.evaluate(data_bin, tmp_path / "saved" / "checkpoint_last.pt") > 1


def test_a_part_that_never_comes(
    saved: Path, hosts: list[Host], data_bin: Path, tmp_path: Path
) -> None:
    """The first save ends the training, with one line that names the part."""
    shutil.copytree(saved, tmp_path / "saved")
    shutil.copytree(saved, tmp_path / "own")
    probe = SlowCopy(tmp_path / "saved", tmp_path / "own", ".seen*", 0)
    probe.start()
    flags = (*SHARDED, "--peer-timeout", "5", "--save-interval-updates", "1")
    job = start(hosts, data_bin, tmp_path, *flags)
    for host in hosts:
        assert job.wait(host) != 0
    probe.ended.set()
    (line,) = [line for line in job.said(hosts[0]).splitlines() if "does not see" in line]
    assert f"{tmp_path}/saved/shards-3-" in line and "/part3-of-4.pt: rank 0 on host" in line
    assert "does not see the file that rank 2 sees, after 5 seconds" in line
    assert not list((tmp_path / "saved").glob("checkpoint_1_3.pt"))


def test_local_folders_are_refused(hosts: list[Host], data_bin: Path, tmp_path: Path) -> None:
    """Sharded blocks are refused before the first update. Data parallelism only warns."""
    (tmp_path / "saved").mkdir()
    job = start(hosts, data_bin, tmp_path, *SHARDED, "--peer-timeout", "3")
    for host in hosts:
        assert job.wait(host) != 0
        (line,) = [line for line in job.said(host).splitlines() if "does not see" in line]
        assert line.startswith(f"--save-dir {tmp_path}/saved: rank 2 on host ")
        assert "all hosts must share the folder" in line
        assert "train_inner" not in job.said(host)
    job = start(hosts, data_bin, tmp_path, "--peer-timeout", "3")
    for host in hosts:
        assert job.wait(host) == 0, job.said(host)[-4000:]
    said = job.said(hosts[0])
    assert f"--save-dir {tmp_path}/saved: only host " in said and 4 in losses(said)
