"""Runs jobs of fairseq-train as ``worker.py`` does, and counts what leaves this host.

The file ``counts.RANK`` in a job's folder has the bytes that the host has sent after each update.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[3])]
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402

from tests.expert_parallel import launch  # noqa: E402
from tests.integration.hosts.network import sent_bytes  # noqa: E402

train_step = Trainer.train_step


def counted_step(self, *args, **kwargs):
    result = train_step(self, *args, **kwargs)
    dist.barrier()  # all ranks have received everything
    folder = Path(self.cfg.checkpoint.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"counts.{os.environ['RANK']}", "a") as file:
        print(json.dumps([self.get_num_updates(), sent_bytes()]), file=file)
    dist.barrier()
    return result


Trainer.train_step = counted_step
torch.set_num_threads(1)
launch.run_jobs(Path(sys.argv[1]))
