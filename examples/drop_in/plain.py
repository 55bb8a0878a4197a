"""Trains a byte-level Transformer language model with sparse memories, in plain PyTorch.

    python examples/drop_in/plain.py --selector moe --save model.pt

needs PyTorch and NumPy, beside this project. fairseq need not be installed.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # where the project is not installed

from fairseq_sffn.memory import MemoryConfig, SparseMemory  # noqa: E402

TEXT = ROOT / "examples" / "data" / "state_of_the_union.txt.xz"
BYTES = 256


class Layer(nn.Module):
    """Causal self-attention and a sparse memory, each after a layer norm."""

    def __init__(self, heads: int, config: MemoryConfig) -> None:
        super().__init__()
        width, self.heads = config.embed_dim, heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.memory = SparseMemory(config)

    def forward(self, x: Tensor, token_ids: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, T, D) and the balance loss ()."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        # Hash methods read the token ids. Padding counts neither as load nor in the balance loss.
        found = self.memory(self.norms[1](x), token_ids, padding_mask=padding)
        loss = x.new_zeros(()) if found.balance_loss is None else found.balance_loss
        return x + found.output, loss


class LanguageModel(nn.Module):
    """A Transformer over bytes; padding, after the end of a text, has the id 256."""

    def __init__(
        self, config: MemoryConfig, layers: int = 2, context: int = 128, remember: bool = True
    ) -> None:
        super().__init__()
        self.remember = remember  # whether to keep activations for the backward pass
        self.embed = nn.Embedding(BYTES + 1, config.embed_dim)
        self.positions = nn.Embedding(context, config.embed_dim)
        self.layers = nn.ModuleList(Layer(4, config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.embed_dim)
        for table in (self.embed, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, T, 256) and the sum of the layers' balance losses, ()."""
        x = self.embed(token_ids) + self.positions.weight[: token_ids.shape[1]]
        balance, padding = x.new_zeros(()), token_ids == BYTES
        for layer in self.layers:
            if self.remember or not self.training:
                x, loss = layer(x, token_ids, padding)
            else:
                x, loss = checkpoint(layer, x, token_ids, padding, use_reentrant=False)
            balance = balance + loss
        return F.linear(self.norm(x), self.embed.weight[:BYTES]), balance


def batches(text: bytes, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Draw pieces of a text, and the byte after each of their bytes: (B, T) each."""
    starts = torch.randint(len(text) - context, (batch,)).tolist()
    pieces = torch.tensor([list(text[start : start + context + 1]) for start in starts])
    return pieces[:, :-1], pieces[:, 1:]


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print the losses, and check that the saved model computes the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--selector", default="moe")
    parser.add_argument("--balance-weight", type=float, help="the selector's default if not given")
    parser.add_argument("--balance-rate", type=float, default=0.0, help="of the loss-free bias")
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--save", default="model.pt")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(arguments)
    torch.manual_seed(1)
    text = lzma.decompress(TEXT.read_bytes())
    counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8), minlength=257)
    one_block = args.selector in ("switch", "hash_layer", "base")
    block_size = 256 if one_block else 1 if "pkm" in args.selector else 32
    settings = dict(
        embed_dim=64,
        num_cells=2048,
        block_size=block_size,
        active_blocks=256 // block_size,
        selector=args.selector,
        vocab_size=BYTES + 1,
        token_counts=counts.tolist(),
        balance_rate=args.balance_rate,
    )
    config = MemoryConfig(**settings)
    weight = args.balance_weight
    if weight is None:
        weight = config.selector_class.default_balance_weight
    model = LanguageModel(config, remember=not args.recompute)
    run = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for update in range(args.updates):
        inputs, targets = batches(text, batch=16, context=128)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits, balance = run(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        (loss + weight * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.layers:
            layer.memory.end_update()  # moves the loss-free biases; needed with --balance-rate only
        losses.append(loss.item())
        if update % 10 == 0 or update == args.updates - 1:
            per_layer = balance.item() / len(model.layers)
            print(
                f"update {update}: {loss / math.log(2):.2f} bits per byte, balance {per_layer:.2f}"
            )

    torch.save({"settings": settings, "weights": model.state_dict()}, args.save)
    saved = torch.load(args.save)
    loaded = LanguageModel(MemoryConfig(**saved["settings"]))
    loaded.load_state_dict(saved["weights"])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(inputs)[0], model.eval()(inputs)[0])
    print(f"{args.save}: loaded, with equal outputs")
    return losses


if __name__ == "__main__":
    main()
