"""fairseq-train that sends itself a signal. Also a program: where, when and which signal, to whom,
then fairseq-train's arguments."""

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
    """Send a signal to a process, by default to this one, and waits until it has come here."""
    os.kill(target or os.getpid(), number)
    while not trainer.interruption.receiver.received:
        time.sleep(0.01)


def at(patch: pytest.MonkeyPatch, place: str, update: int, action: Any) -> None:
    """Do something with the trainer once: in an update, where the validation after it begins,
    where that ends, or while the update is saved."""
    owner, name, position = {
        "update": (Trainer, "train_step", 0),
        "validation": (Trainer, "begin_valid_epoch", 0),
        "validated": (train_command, "validate", 1),
        "save": (SFFNTrainer, "save_checkpoint", 0),
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
    """What the program does."""
    place, update, number, target, *arguments = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    sys.argv = ["fairseq-train", *arguments]
    if "unseen" in target:
        del os.pidfd_open

    def act(trainer: Any) -> None:
        if target == "group":
            # Another process, since those that load data obey their parent.
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
