"""fairseq-train that waits for a signal after an update. It takes the update and fairseq-train's
arguments. A training that resumes after this update does not wait."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[3])]
import pytest  # noqa: E402
from fairseq_cli import train as train_command  # noqa: E402

from tests.integration import interrupted  # noqa: E402


def hold(trainer: Any) -> None:
    """Wait until this process has received a signal."""
    print("waits for a signal", flush=True)
    while not trainer.receiver.received:
        time.sleep(0.05)


if __name__ == "__main__":
    update, *arguments = sys.argv[1:]
    sys.argv = ["fairseq-train", *arguments]
    interrupted.at(pytest.MonkeyPatch(), "update", int(update), hold)
    train_command.cli_main()
