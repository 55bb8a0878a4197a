"""Which blocks a model's sparse layers use for which tokens."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..memory import SparseMemory

POSITIONS = 256
"""Of which the blocks themselves are kept, to compare models."""
MOST_KEPT = 16
"""Active blocks, up to which they are."""
MOST_LISTED = 256
"""Blocks, up to which the tokens of each are listed."""
MOST_PAIRS = 2**28
"""Pairs of block and token type, a GiB a layer, up to which they are counted."""
TOP = 8
"""Tokens listed for a block."""


class Routing:
    """Watches a model's sparse layers while it is open.

    Args:
        model: a language model.
        dictionary: of its tokens.
        tokens: that it is about to read, of which positions are drawn.
    """

    def __init__(self, model: nn.Module, dictionary: Dictionary, tokens: int) -> None:
        self.dictionary = dictionary
        self.memories = {
            name.removeprefix("decoder.layers.").removesuffix(".fc1.memory"): module
            for name, module in model.named_modules()
            if isinstance(module, SparseMemory)
        }
        self.counts_B: dict[str, Tensor] = {}
        """How often each block was used."""
        self.pairs_BV: dict[str, Tensor] = {}
        """How often each block was used for each token, where there are not too many pairs."""
        self.blocks: dict[str, list[list[int]]] = {name: [] for name in self.memories}
        self.ids: list[int] = []
        generator = torch.Generator().manual_seed(0)  # the same positions for every model
        self.drawn = torch.randperm(tokens, generator=generator)[:POSITIONS]
        self.read = 0
        self.ids_N = torch.empty(0, dtype=torch.int64)
        self.is_drawn_N = torch.empty(0, dtype=torch.bool)
        self.handles: list[Any] = []

    def __enter__(self) -> Routing:
        for name, memory in self.memories.items():
            blocks = memory.config.num_blocks
            types = len(self.dictionary)
            self.counts_B[name] = torch.zeros(blocks, dtype=torch.int64)
            if blocks * types <= MOST_PAIRS:
                self.pairs_BV[name] = torch.zeros(blocks, types, dtype=torch.int32)

            def see(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self.see(name, output.selection.blocks)

            self.handles.append(memory.register_forward_hook(see))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def tokens(self, ids_BT: Tensor) -> None:
        """The tokens (batch, time) that the model is about to read."""
        self.ids_N = ids_BT.t().reshape(-1).cpu()  # layers work on (time, batch)
        real_N = self.ids_N != self.dictionary.pad()
        number_N = self.read + real_N.cumsum(0) - 1
        self.is_drawn_N = real_N & torch.isin(number_N, self.drawn)
        self.read += int(real_N.sum())
        self.ids += self.ids_N[self.is_drawn_N].tolist()

    def see(self, name: str, blocks_NA: Tensor) -> None:
        """Counts what a layer selected."""
        blocks_NA = blocks_NA.cpu()
        if blocks_NA.shape[1] <= MOST_KEPT:
            self.blocks[name] += blocks_NA[self.is_drawn_N].tolist()
        real_N = self.ids_N != self.dictionary.pad()
        blocks_NA, ids_N = blocks_NA[real_N], self.ids_N[real_N]
        counts_B = self.counts_B[name]
        counts_B += blocks_NA.reshape(-1).bincount(minlength=len(counts_B))
        if (pairs_BV := self.pairs_BV.get(name)) is not None:
            flat = (blocks_NA * pairs_BV.shape[1] + ids_N[:, None]).reshape(-1)
            pairs_BV.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=pairs_BV.dtype))

    def report(self) -> dict[str, dict[str, Any]]:
        """What was seen, by layer.

        Returns:
            ``counts``: uses of each block; ``block_bits``: entropy of a use's block;
            ``token_bits``: its mutual information with the token id, of the sample, which is the
            entropy less log2 of the active blocks where the id decides alone; ``top_tokens``: of
            each block, those whose uses exceed the expected the most; ``blocks``: those selected at
            positions drawn from all, whose tokens are ``positions``. These three are empty, and
            ``token_bits`` is ``None``, where there are too many blocks.
        """
        report = {}
        for name, counts_B in self.counts_B.items():
            share_B = counts_B.double() / counts_B.sum().clamp(min=1)
            bits, top = self.of_tokens(name)
            report[name] = {
                "counts": counts_B.tolist(),
                "block_bits": round(float(torch.special.entr(share_B).sum()) / math.log(2), 4),
                "token_bits": bits,
                "top_tokens": top,
                "blocks": self.blocks[name],
                "positions": self.ids if self.blocks[name] else [],
            }
        return report

    def of_tokens(self, name: str) -> tuple[float | None, list[list[str]]]:
        """``token_bits`` and ``top_tokens`` of a layer; see :meth:`report`."""
        if name not in self.pairs_BV:
            return None, []
        pairs_BV = self.pairs_BV[name]
        joint = pairs_BV.double() / pairs_BV.sum().clamp(min=1)
        expected = joint.sum(1)[:, None] * joint.sum(0)[None, :]
        used = joint > 0
        bits = round(float((joint[used] * (joint[used] / expected[used]).log2()).sum()), 4)
        if len(pairs_BV) > MOST_LISTED:
            return bits, []
        surplus, ids = (joint - expected).topk(TOP)
        return bits, [
            [self.dictionary[i] for i, more in zip(row, extra, strict=True) if more > 0]
            for row, extra in zip(ids.tolist(), surplus.tolist(), strict=True)
        ]
