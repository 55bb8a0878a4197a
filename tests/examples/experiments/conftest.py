"""Runs the processes of ``experiments run`` inside the test process."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import Any

import pytest

from experiments.runner import Runner
from fairseq_sffn.tools import cli
from tests import commands


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the processes that are started. They run in this process instead, which is faster."""
    started: list[list[str]] = []

    def call(self: Runner, command: list[str], folder: Path, stdout: Any, stderr: Any) -> int:
        module, *arguments = command[command.index("-m") + 1 :]
        started.append([module, *arguments])
        try:
            if module == "fairseq_cli.train":
                stdout.write(commands.run("train", *arguments))
            else:
                with contextlib.redirect_stdout(stdout):
                    cli.main(arguments)
        except (Exception, SystemExit):
            stdout.write(traceback.format_exc())
            return 1
        return 0

    monkeypatch.setattr(Runner, "call", call)
    return started
