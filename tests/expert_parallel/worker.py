"""One of several processes that run jobs of fairseq-train, one after the other. Started by torchrun
with a JSON file of {name: arguments}; the log of each rank goes to NAME.RANK.log beside it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]
import torch  # noqa: E402

from tests.expert_parallel import launch  # noqa: E402

torch.set_num_threads(1)
launch.run_jobs(Path(sys.argv[1]))
