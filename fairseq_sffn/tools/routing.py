"""Statistics of the blocks that a model's sparse layers use for each token."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..memory import SparseMemory

POSITIONS = 256
"""Number of token positions for which the selected blocks are kept, to compare models."""
MOST_KEPT = 16
"""Most active blocks of a layer for which the selected blocks are kept."""
MOST_LISTED = 256
"""Most blocks of a layer for which the tokens of each block are listed."""
MOST_PAIRS = 2**28
"""Most (block, token type) pairs of a layer whose uses are counted: 1 GiB of int32 counts."""
TOP = 8
"""Number of tokens listed for a block."""


class Routing:
    """Context manager that counts the selections of a model's sparse layers.

    Args:
        model: a language model.
        dictionary: the dictionary of its tokens.
        tokens: number of tokens that the model will read. Positions are drawn from them.
    """

    def __init__(self, model: nn.Module, dictionary: Dictionary, tokens: int) -> None:
        self.dictionary = dictionary
        self.memories = {
            name.removeprefix("decoder.layers.").removesuffix(".fc1.memory"): module
            for name, module in model.named_modules()
            if isinstance(module, SparseMemory)
        }
        self.counts_B: dict[str, Tensor] = {}
        """Layer -> uses of each block."""
        self.token_counts_BV: dict[str, Tensor] = {}
        """Layer -> uses of each block for each token type; without layers above ``MOST_PAIRS``."""
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
            blocks = memory.config.routed_blocks
            types = len(self.dictionary)
            self.counts_B[name] = torch.zeros(blocks, dtype=torch.int64)
            if blocks * types <= MOST_PAIRS:
                self.token_counts_BV[name] = torch.zeros(blocks, types, dtype=torch.int32)

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
        """Set the tokens that the model reads next.

        Args:
            ids_BT: (batch, time) token ids.
        """
        self.ids_N = ids_BT.t().reshape(-1).cpu()  # layers work on (time, batch)
        real_N = self.ids_N != self.dictionary.pad()
        number_N = self.read + real_N.cumsum(0) - 1
        self.is_drawn_N = real_N & torch.isin(number_N, self.drawn)
        self.read += int(real_N.sum())
        self.ids += self.ids_N[self.is_drawn_N].tolist()

    def see(self, name: str, blocks_NA: Tensor) -> None:
        """Count the blocks that a layer selected.

        Args:
            name: name of the layer.
            blocks_NA: (tokens, active blocks) selected blocks.
        """
        blocks_NA = blocks_NA.cpu()
        if blocks_NA.shape[1] <= MOST_KEPT:
            self.blocks[name] += blocks_NA[self.is_drawn_N].tolist()
        real_N = self.ids_N != self.dictionary.pad()
        blocks_NA, ids_N = blocks_NA[real_N], self.ids_N[real_N]
        counts_B = self.counts_B[name]
        counts_B += blocks_NA.reshape(-1).bincount(minlength=len(counts_B))
        if (token_counts_BV := self.token_counts_BV.get(name)) is not None:
            flat = (blocks_NA * token_counts_BV.shape[1] + ids_N[:, None]).reshape(-1)
            token_counts_BV.view(-1).index_add_(
                0, flat, torch.ones_like(flat, dtype=token_counts_BV.dtype)
            )

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the statistics of each layer.

        Returns:
            Name of the layer -> a dictionary with:

            - ``counts``: uses of each block;
            - ``block_bits``: entropy of the used block, in bits;
            - ``token_bits``: mutual information of the used block and the token id in this sample,
              in bits. If the token id alone decides, it is the entropy minus log2 of the number of
              active blocks. ``None``: there are too many blocks;
            - ``top_tokens``: for each block, the tokens whose uses exceed the expected number most;
            - ``blocks``: the blocks selected at the drawn positions;
            - ``positions``: the token ids at the drawn positions.

            The last three are empty if there are too many blocks.
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
        """Return ``token_bits`` and ``top_tokens`` of a layer; see :meth:`report`."""
        if name not in self.token_counts_BV:
            return None, []
        token_counts_BV = self.token_counts_BV[name]
        joint = token_counts_BV.double() / token_counts_BV.sum().clamp(min=1)
        expected = joint.sum(1)[:, None] * joint.sum(0)[None, :]
        used = joint > 0
        bits = round(float((joint[used] * (joint[used] / expected[used]).log2()).sum()), 4)
        if len(token_counts_BV) > MOST_LISTED:
            return bits, []
        surplus, ids = (joint - expected).topk(TOP)
        return bits, [
            [self.dictionary[i] for i, more in zip(row, extra, strict=True) if more > 0]
            for row, extra in zip(ids.tolist(), surplus.tolist(), strict=True)
        ]
