"""A memory in a model of PyTorch's DistributedDataParallel."""

from tests.expert_parallel import launch


def test_two_processes_train_like_one() -> None:
    done = launch.run(2, launch.HERE / "drop_in_worker.py")
    assert done.returncode == 0, done.stderr[-3000:]
    # Both write to one pipe, so that a line may follow the other without a line break.
    assert all(f"rank {rank} is equal" in done.stdout for rank in range(2)), done.stdout
