"""Runs fairseq-train on a host that vanishes: a rank kills all processes of its host at an update.

The arguments are the update, the rank, and fairseq-train's. A training that is restarted goes on.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3])]
from fairseq.trainer import Trainer  # noqa: E402
from fairseq_cli import train  # noqa: E402

update, rank, *arguments = sys.argv[1:]
sys.argv = ["fairseq-train", *arguments]
train_step = Trainer.train_step


def vanish() -> None:
    """Kill all processes in this network namespace, this one last."""
    here = os.stat("/proc/self/ns/net").st_ino
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.stat(process / "ns" / "net").st_ino == here and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def step(self, *args, **kwargs):
    result = train_step(self, *args, **kwargs)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == rank and self.get_num_updates() == int(update):
        vanish()
    return result


Trainer.train_step = step
train.cli_main()
