"""Trains a GPT-2 or a Llama of transformers whose MLPs are sparse memories.

    python examples/drop_in/transformers_models.py --model llama --selector moe --save FOLDER

needs PyTorch, NumPy and transformers, beside this project. The models are small and begin with
random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import lzma
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # where the project is not installed

from fairseq_sffn.memory import MemoryConfig, SparseMemory  # noqa: E402
from fairseq_sffn.memory.drop_in import MemoryFFN, begin_update, end_update, feed_tokens  # noqa: E402

TEXT = ROOT / "examples" / "data" / "state_of_the_union.txt.xz"
BYTES = 256
UNGATED = ("pkm", "lorkm", "aoe")
"""Methods without a key table to gate."""


class Sparse:
    """Base class to put before a model of transformers.

    ``config.memory`` has the settings of the memories, without the width. It is saved with the
    model, so that ``from_pretrained`` builds the same layers.
    """

    _keep_in_fp32_modules_strict = ("balancer",)  # where half precision would lose small steps

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # otherwise inferred from the name of the class
        settings = MemoryConfig(embed_dim=config.hidden_size, **config.memory)
        for block in self.blocks():
            block.mlp = MemoryFFN(SparseMemory(settings), config.balance_weight)
        feed_tokens(self)  # token ids for hash methods, and the padding

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, and set the counters of the load to 0.

        No file has them, and the base model of transformers does not set them.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        begin_update(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


class SparseGPT2(Sparse, GPT2LMHeadModel):
    """GPT-2 with sparse memories."""

    def blocks(self) -> nn.ModuleList:
        return self.transformer.h


class SparseLlama(Sparse, LlamaForCausalLM):
    """Llama with sparse memories."""

    def blocks(self) -> nn.ModuleList:
        return self.model.layers


def build(name: str, memory: dict[str, Any], balance_weight: float | None) -> Sparse:
    """Build a small model with random weights."""
    extra = dict(memory=memory, balance_weight=balance_weight)
    sizes = dict(vocab_size=BYTES + 1, bos_token_id=None, eos_token_id=None, pad_token_id=BYTES)
    if name == "gpt2":
        config = GPT2Config(n_positions=128, n_embd=64, n_layer=2, n_head=4, **sizes, **extra)
        return SparseGPT2(config)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **sizes,
        **extra,
    )
    return SparseLlama(config)


def batch(text: bytes, size: int, length: int) -> dict[str, Tensor]:
    """Draw pieces of a text of different lengths, padded on the right."""
    lengths = torch.randint(length // 2, length + 1, (size, 1))
    starts = torch.randint(len(text) - length, (size,)).tolist()
    ids = torch.tensor([list(text[start : start + length]) for start in starts])
    padding = torch.arange(length) >= lengths
    return {
        "input_ids": ids.masked_fill(padding, BYTES),
        "attention_mask": (~padding).long(),
        "labels": ids.masked_fill(padding, -100),
    }


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print the losses, and check that the saved model computes the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--selector", default="moe")
    parser.add_argument("--balance-weight", type=float, help="the selector's default if not given")
    parser.add_argument("--balance-rate", type=float, default=0.0, help="of the loss-free bias")
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--save", default="sparse-model")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    args = parser.parse_args(arguments)
    torch.manual_seed(1)
    text = lzma.decompress(TEXT.read_bytes())
    one_block = args.selector in ("switch", "hash_layer", "base")
    block_size = 256 if one_block else 1 if "pkm" in args.selector else 32
    memory: dict[str, Any] = dict(
        num_cells=2048,
        block_size=block_size,
        active_blocks=256 // block_size,
        selector=args.selector,
        balance_rate=args.balance_rate,
        glu="silu" if args.model == "llama" and args.selector not in UNGATED else None,
        activation="gelu",
    )
    if "hash" in args.selector:
        counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8), minlength=257)
        memory |= dict(vocab_size=BYTES + 1, token_counts=counts.tolist())
    model = build(args.model, memory, args.balance_weight).train()
    if args.recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # Moves the loss-free biases; needed with --balance-rate only.
    optimizer.register_step_post_hook(lambda *_: end_update(model))
    losses = []
    for update in range(args.updates):
        inputs = batch(text, size=16, length=128)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(**inputs).loss
        loss.backward()  # the balance loss joins here
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if update % 10 == 0 or update == args.updates - 1:
            print(f"update {update}: loss {loss:.3f}")

    model.eval().save_pretrained(args.save)
    loaded = type(model).from_pretrained(args.save)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():  # not to the last bit: sums depend on the alignment of the tables
        pairs = loaded(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-5)
    prompt = torch.tensor([list(b"The Congress ")])
    settings = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    words = loaded.generate(prompt, **settings)
    assert torch.equal(words, model.generate(prompt, use_cache=False, **settings))
    print(f"{args.save}: loaded, with equal outputs: {bytes(words[0].clamp(max=255).tolist())!r}")
    return losses


if __name__ == "__main__":
    main()
