"""The commands of the documents for two hosts, as they are written there."""

import os
import subprocess
import sys
from pathlib import Path

from tests import commands
from tests.expert_parallel import launch
from tests.integration.hosts.network import CABLE, KEEPER, PAGE
from tests.integration.hosts.test_lost_hosts import STORE


def block(first: str, last: str) -> str:
    """Return the lines of the page from one that begins with a text to one that is a text."""
    lines = [line.removeprefix("    ") for line in PAGE.splitlines()]
    begin = next(number for number, line in enumerate(lines) if line.startswith(first))
    return "\n".join(lines[begin : lines.index(last, begin) + 1])


def test_two_namespaces(can_have_hosts: None, data_bin: Path, tmp_path: Path) -> None:
    """A shell runs the commands in namespaces of its own. Only the number of updates is smaller."""
    text = block("export GLOO_SOCKET_IFNAME", "wait")
    assert text.count("torchrun") == 2 and text.count("--max-update 50") == 2
    for name, value in (("DATA-BIN", data_bin), ("CKPT", tmp_path / "saved")):
        text = text.replace(name, str(value))
    text = text.replace("--max-update 50", "--max-update 2 --log-format json --log-interval 1")
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", f"{KEEPER}{CABLE}{text}"],
        **{"cwd": commands.ROOT, "capture_output": True, "text": True},
        env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        timeout=launch.HANGS_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "training on 4 devices" in done.stdout + done.stderr
    assert list(commands.losses(done.stdout + done.stderr)) == [1, 2]
    assert len(list((tmp_path / "saved").glob("shards-*/part?-of-4.pt"))) % 4 == 0
    assert commands.evaluate(data_bin, tmp_path / "saved" / "checkpoint_last.pt") > 1


def test_commands_of_other_tests_are_those_of_the_page() -> None:
    assert CABLE.count("\n") == 9
    assert f'python -c "{STORE}"' in PAGE
