"""Shared blocks: the blocks that every token uses, beside those that are routed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import MemoryConfig


class SharedBlocks(nn.Module):
    """A dense FFN of the cells in shared blocks (Dai et al. 2024, arXiv 2401.06066, section 3.2).

    It has keys of its own, also where the selector of the routed blocks uses no key table. Its
    parameters are replicas where blocks are sharded. The output bias is the memory's.

    Args:
        config: the memory's sizes and choices.

    Attributes:
        keys, values: (C, D), where C is ``config.shared_cells``.
        key_bias: (C,), or ``None`` without ``config.bias``.
        up, up_bias: (C, D) and (C,) of gated cells, or ``None``.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        cells, width = config.shared_cells, config.embed_dim

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape)) if wanted else None

        gated = config.glu is not None
        self.keys = nn.Parameter(torch.empty(cells, width))
        self.key_bias = parameter(config.bias, cells)
        self.up = parameter(gated, cells, width)
        self.up_bias = parameter(gated and config.bias, cells)
        self.values = nn.Parameter(torch.empty(cells, width))

    def forward(
        self,
        x_ND: Tensor,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute all cells, in the dtype of x.

        Args:
            x_ND: hidden states.
            activation: f, elementwise.
            dropout: applied to the hidden activations.

        Returns:
            (N, D) output without bias.
        """

        def products_NC(table_CD: Tensor, bias_C: Tensor | None) -> Tensor:
            bias_C = None if bias_C is None else bias_C.to(x_ND.dtype)
            return F.linear(x_ND, table_CD.to(x_ND.dtype), bias_C)

        hidden_NC = activation(products_NC(self.keys, self.key_bias))
        if self.up is not None:
            hidden_NC = hidden_NC * products_NC(self.up, self.up_bias)
        return dropout(hidden_NC).to(x_ND.dtype) @ self.values.to(x_ND.dtype)
