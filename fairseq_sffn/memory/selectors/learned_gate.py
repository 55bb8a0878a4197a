"""The base class of selectors with a learned gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, Selector, SelectorInput


class LearnedGate(Selector):
    """Top-b blocks by a learned linear map.

    Scores are computed in fp32, for any dtype of the model (Fedus et al. 2021, arXiv 2101.03961,
    section 2.4, selective precision).
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.num_blocks, self.active_blocks = config.num_blocks, config.active_blocks
        self.router = nn.Parameter(torch.empty(config.num_blocks, config.embed_dim))
        nn.init.normal_(self.router, std=config.embed_dim**-0.5)

    @classmethod
    def num_params(cls, config: MemoryConfig) -> int:
        return config.num_blocks * config.embed_dim

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        return 2 * config.num_blocks * config.embed_dim

    def scores(self, inputs: SelectorInput) -> Scores:
        """Return the scores of all blocks."""
        dtype = torch.promote_types(inputs.x.dtype, torch.float32)
        with torch.autocast(inputs.x.device.type, enabled=False):
            return Scores(F.linear(inputs.x.to(dtype), self.router.to(dtype)))

    def forward(self, inputs: SelectorInput) -> Selection:
        scores = self.scores(inputs)
        return Selection(inputs.top(scores, self.active_blocks), scores)
