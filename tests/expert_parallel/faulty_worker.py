"""Runs fairseq-train on one of several processes, one of which fails. torchrun starts it with the
kind of fault, the rank that fails, and fairseq-train's arguments."""

import errno
import inspect
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]
import torch  # noqa: E402
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.optim import FairseqOptimizer  # noqa: E402
from fairseq.tasks import FairseqTask  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from fairseq_cli import train  # noqa: E402

fault, rank, *arguments = sys.argv[1:]
here = os.environ["RANK"] == rank
sys.argv = ["fairseq-train", *arguments]
train_step, torch_save = Trainer.train_step, torch.save
all_reduce_grads = FairseqOptimizer.all_reduce_grads
task_step = FairseqTask.train_step


def failing_step(self, *args, **kwargs):
    result = train_step(self, *args, **kwargs)
    if self.get_num_updates() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def step_out_of_memory(self, sample, model, criterion, optimizer, update_num, **kwargs):
    if update_num == 3:
        raise RuntimeError("out of memory, as a GPU says it")
    return task_step(self, sample, model, criterion, optimizer, update_num, **kwargs)


def failing_reduction(self, module):
    all_reduce_grads(self, module)
    next(module.parameters()).grad.add_(0.1)


def failing_save(state, file, *args, **kwargs):
    torch_save(state, file, *args, **kwargs)
    # Write half of a part of the second checkpoint, or of the file that names the parts.
    name = str(file.file.name)
    if is_second(name):
        file.flush()
        os.truncate(name, os.path.getsize(name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def is_second(name):
    """Return whether a file of the kind that the fault names is written for the second time."""
    if Path(name).name.startswith("part" if fault.endswith("a part") else "checkpoint_"):
        saves.append(name)
        return len(saves) == 2
    return False


def save_on_full_disk(state, name):
    if is_second(name):
        Path(name).write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(state, name)


saves: list[str] = []
if here and fault == "killed":
    Trainer.train_step = failing_step
if here and fault == "out of memory":
    FairseqTask.train_step = step_out_of_memory
if here and fault == "diverged":
    FairseqOptimizer.all_reduce_grads = failing_reduction
if here and fault.startswith("killed saving"):
    torch.save = checkpoint_utils.torch.save = failing_save
if here and fault.startswith("no room for"):
    from fairseq_sffn.checkpoints import writing

    save, writing.save = writing.save, save_on_full_disk
if fault == "other flags by another way":  # for example fairseq-hydra-train
    import fairseq_sffn  # noqa: F401

    train.add_defaults = inspect.unwrap(train.add_defaults)
if here and fault.startswith("other flags"):
    sys.argv += ["--lr", "0.5"]
if here and fault == "other code":
    from fairseq_sffn.expert_parallel import settings

    settings.code_fingerprint = lambda: "another"
train.cli_main()
