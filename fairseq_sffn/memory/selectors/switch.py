"""Switch: a learned gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MemoryConfig
from ..selection import Selection, Selector


class Switch(Selector):
    """Top-b blocks of a learned linear gate; by default one block, times its probability.

    Fedus et al. 2021 (arXiv 2101.03961), section 2.1. The gate is computed in fp32 whatever the
    model's dtype (section 2.4, selective precision).
    """

    name = "switch"
    default_gate = "softmax"
    default_balance_weight = 0.01

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.active_blocks = config.active_blocks
        self.router = nn.Parameter(torch.empty(config.num_blocks, config.embed_dim))
        nn.init.normal_(self.router, std=config.embed_dim**-0.5)

    @classmethod
    def num_params(cls, config: MemoryConfig) -> int:
        return config.num_blocks * config.embed_dim

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        return 2 * config.num_blocks * config.embed_dim

    def forward(
        self,
        x_ND: Tensor,
        keys_CD: Tensor | None,
        key_bias_C: Tensor | None,
        token_ids_NT: Tensor | None,
    ) -> Selection:
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NB = F.linear(x_ND.to(dtype), self.router.to(dtype))
        return Selection(scores_NB.topk(self.active_blocks, dim=-1).indices, scores=scores_NB)
