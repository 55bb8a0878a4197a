"""Runs fairseq-train, which sends itself a signal. As a program, it takes the place, the update,
the signal, the target, and fairseq-train's arguments."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]
import pytest  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from fairseq_cli import train as train_command  # noqa: E402

from fairseq_sffn.patches.trainer import SFFNTrainer  # noqa: E402


def send(trainer: Any, number: int, target: int | None = None) -> None:
    """Send a signal to a process, by default to this one, and wait until it has arrived here."""
    os.kill(target or os.getpid(), number)
    while not trainer.receiver.received:
        time.sleep(0.01)


def at(patch: pytest.MonkeyPatch, place: str, update: int, action: Any) -> None:
    """Call a function with the trainer once: in an update, at the beginning or end of the
    validation after it, while the update is saved, or before the next epoch."""
    owner, name, position = {
        "update": (Trainer, "train_step", 0),
        "validation": (Trainer, "begin_valid_epoch", 0),
        "validated": (train_command, "validate", 1),
        "save": (SFFNTrainer, "save_checkpoint", 0),
        "next epoch": (Trainer, "get_train_iterator", 0),
    }[place]
    original, done = getattr(owner, name), []

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if args[position].get_num_updates() == update and not done:
            done.append(True)
            action(args[position])
        return result

    patch.setattr(owner, name, function)


def main() -> None:
    """Run the program."""
    place, update, number, target, *arguments = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    sys.argv = ["fairseq-train", *arguments]
    if "unseen" in target:
        del os.pidfd_open

    def act(trainer: Any) -> None:
        if target == "group":
            # The signal comes from another process, as processes that load data obey their parent.
            kill = ("kill", f"-{number}", "--", f"-{os.getpgrp()}")
            subprocess.run(kill, check=True, start_new_session=True)
        elif target == "parent" and rank == "0":
            send(trainer, int(number), os.getppid())
        elif target == "twice":
            os.kill(os.getpid(), int(number))
            time.sleep(1.5)
            os.kill(os.getpid(), int(number))
            time.sleep(600)
        elif target.startswith("lost"):
            os.kill(os.getpid(), int(number))
            if rank == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        elif target == rank:
            send(trainer, int(number))

    at(pytest.MonkeyPatch(), place, int(update), act)
    train_command.cli_main()


if __name__ == "__main__":
    main()
