"""A memory in a model of PyTorch's DistributedDataParallel."""

from tests.expert_parallel import launch


def test_two_processes_train_like_one() -> None:
    done = launch.run(2, launch.HERE / "drop_in_worker.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"rank 0 is equal", "rank 1 is equal"} <= set(done.stdout.splitlines()), done.stdout
