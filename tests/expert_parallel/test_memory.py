"""Memories whose tokens and blocks are sharded equal a memory in one process."""

import json

import pytest

from tests.expert_parallel import launch
from tests.memory.cases import CASES, UNSCORED

pytestmark = pytest.mark.usefixtures("quick_start")
WHOLE = {
    "avgk-whole": "does not divide the 1 blocks",
    **{case: "scores every key" for case in CASES if case.startswith("vanilla_m")},
    **{case: "has keys of its own" for case in CASES if case.startswith(("lorkm", "pkm", "aoe"))},
    **{"pkm_ffn": None, "pkm_ffn-glu": None},
}
"""Method -> reason why its blocks cannot be sharded."""
CASES_HERE = [
    *(case for case in CASES if case != "gshard-sampled"),
    "avgk-balanced",
    "avgk-averaged",
    "avgk-centered",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "report.json"
    done = launch.run(4, launch.HERE / "memory_worker.py", path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("case", CASES_HERE)
def test_four_processes_are_one(case, shards, gate, report):
    if gate == "sigmoid" and case in UNSCORED:
        return
    outcome, reason = report[f"{case}/{shards}/{gate}"], WHOLE.get(case)
    if shards == 1 or reason is None:
        assert outcome == "equal"
    else:
        assert outcome.startswith("refused") and reason in outcome
