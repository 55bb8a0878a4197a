"""Runs jobs of fairseq-train, one after the other, as one of several processes. torchrun starts it
with a JSON file of {name: arguments}. The log of each rank goes to NAME.RANK.log beside it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]
import torch  # noqa: E402

from tests.expert_parallel import launch  # noqa: E402

torch.set_num_threads(1)
launch.run_jobs(Path(sys.argv[1]))
