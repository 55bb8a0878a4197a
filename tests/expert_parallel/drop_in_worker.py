"""Runs one of two processes that train with PyTorch's DistributedDataParallel.

It compares the model with one that a single process trained on all tokens.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2])]
from fairseq_sffn.memory import MemoryConfig, ProcessGroups, SparseMemory  # noqa: E402
from fairseq_sffn.memory.drop_in import MemoryFFN, end_update  # noqa: E402

CONFIG = MemoryConfig(8, 32, 8, 2, selector="switch", balance_rate=0.1)


def train(model, called, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: end_update(model))
    for batch in batches:
        optimizer.zero_grad()
        called(batch).square().mean().backward()
        optimizer.step()


def build(groups):
    torch.manual_seed(3)
    ffn = MemoryFFN(SparseMemory(CONFIG, groups), balance_weight=5.0)
    return nn.Sequential(nn.Linear(8, 8), ffn).double()


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(9)
    batches = 3 * torch.randn(3, 8, 8, dtype=torch.float64)
    alone = build(None)
    train(alone, alone, batches)
    model = build(ProcessGroups(tokens=dist.group.WORLD))
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    train(model, parallel, [batch.chunk(2)[rank] for batch in batches])
    assert alone[1].memory.balancer.bias.any()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=0, atol=1e-12)
    print(f"rank {rank} is equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
