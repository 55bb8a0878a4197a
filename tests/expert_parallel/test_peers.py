"""The watch over other processes: its words, and the flag for its time."""

import os

import pytest

from fairseq_sffn.errors import UsageError
from fairseq_sffn.expert_parallel.peers import Place, lost_ranks, own_address
from fairseq_sffn.options import waiting
from tests import commands

PLACES = [Place(rank, f"node{rank // 2}", f"10.0.0.{rank // 2}") for rank in range(6)]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([2, 3], "host node1 (10.0.0.1) with ranks 2, 3"),
        ([3], "rank 3 on host node1 (10.0.0.1)"),
        ([5, 4, 1], "rank 1 on host node0 (10.0.0.0) and host node2 (10.0.0.2) with ranks 4, 5"),
    ],
)
def test_hosts_and_ranks_in_words(ranks: list[int], words: str) -> None:
    assert lost_ranks(ranks, PLACES) == words


def test_a_host_of_all_ranks_is_not_lost_as_a_whole() -> None:
    places = [Place(rank, "node", "") for rank in range(2)]
    assert lost_ranks([1], places) == "rank 1 on host node"
    assert lost_ranks([0, 1], places) == "ranks 0, 1 on host node"


def test_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("MASTER_PORT", "none")
    assert own_address() == ""


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
def test_wrong_times_are_refused(value: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(waiting.VARIABLE, raising=False)
    with pytest.raises(UsageError, match=f"--peer-timeout {value}: must be at least 0"):
        commands.train(tmp_path, tmp_path, "avgk", f"--peer-timeout={value}")
    assert waiting.VARIABLE not in os.environ
    monkeypatch.setenv(waiting.VARIABLE, value)
    with pytest.raises(UsageError, match=f"{waiting.VARIABLE} {value}: must be at least 0"):
        waiting.peer_timeout()


def test_the_flag_sets_the_variable(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.VARIABLE, "1")
    with pytest.raises(SystemExit):  # there is no data
        commands.train(tmp_path / "none", tmp_path, "avgk", "--peer-timeout", "30")
    assert waiting.peer_timeout() == 30
