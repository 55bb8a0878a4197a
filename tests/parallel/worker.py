"""One of several processes that run jobs of fairseq-train, one after the other. Started by torchrun
with a JSON file of {name: arguments}; the log of each rank goes to NAME.RANK.log beside it."""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
import commands  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
jobs = Path(sys.argv[1])
for name, arguments in json.loads(jobs.read_text()).items():
    log = commands.run("train", *arguments)
    (jobs.parent / f"{name}.{os.environ['RANK']}.log").write_text(log)
commands.leave()
