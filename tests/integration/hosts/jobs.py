"""Trainings on two hosts with two processes each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.expert_parallel import launch
from tests.integration.hosts.network import Host

FLAGS = (
    *launch.SAME_SENTENCES,
    *("--batch-size", "4", "--required-batch-size-multiple", "1", "--no-epoch-checkpoints"),
    *("--disable-validation",),
)
TRAIN = Path(sys.executable).parent / "fairseq-train"
ENDLESS = ("--max-update", "100000", "--log-interval", "1")


class Job:
    """A command on both hosts.

    Args:
        folder: folder for what the hosts print.
        hosts: the hosts.
        meets: whether the launchers meet on the first host. Otherwise ``flags`` say where.
        words: a Python program and its arguments.
        flags: further flags of torchrun.
        options: ``binds`` of a host's name, and environment variables.
    """

    def __init__(
        self,
        folder: Path,
        hosts: list[Host],
        *words: Any,
        flags: tuple[str, ...] = (),
        meets: bool = True,
        **options: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        binds = options.pop("binds", {})
        self.logs = {host.name: folder / f"{host.name}.log" for host in hosts}
        self.processes = {
            host.name: host.torchrun(
                *(self.logs[host.name], hosts[0] if meets else None, *words),
                **{"flags": flags, "binds": binds.get(host.name), **options},
            )
            for host in hosts
        }

    def said(self, host: Host) -> str:
        """Return what a host has printed."""
        return self.logs[host.name].read_text()

    def wait(self, host: Host, seconds: float = launch.HANGS_SECONDS) -> int:
        """Return the exit status of a host's launcher, which must end within so many seconds."""
        try:
            return self.processes[host.name].wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{host.name} does not end:\n{self.said(host)[-4000:]}") from error

    def wait_until(self, done: Callable[[], Any]) -> None:
        """Wait until a condition is true, while all launchers run."""
        end = time.monotonic() + launch.HANGS_SECONDS
        while not done():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                said = "\n\n".join(path.read_text()[-4000:] for path in self.logs.values())
                raise AssertionError(f"ended too early: {ended}\n{said}")
            time.sleep(0.05)


def losses(said: str) -> dict[int, str]:
    """Return update -> training loss, as a program that sets up logging itself prints it."""
    records = map(json.loads, re.findall(r"train_inner\W.*?(\{.*\})", said))
    return {int(record["num_updates"]): record["loss"] for record in records}


def final_state(save_dir: Path) -> dict[str, Any]:
    """Return the model, its optimizer state, and those of its parts."""
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)
    folder = state["sffn"].get("folder", "none")
    parts = [torch.load(path, weights_only=True) for path in sorted(save_dir.glob(f"{folder}/*"))]
    return {
        "model": state["model"],
        "optimizer": state["last_optimizer_state"],
        "parts": [{key: part[key] for key in ("model", "optimizer")} for part in parts],
    }
