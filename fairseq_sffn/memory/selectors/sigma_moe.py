"""Sigma-MoE: a learned gate with sigmoid weights, expert dropout and entropy regularisation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, SelectorConfig, SelectorInput
from ..validation import ConfigError
from .learned_gate import LearnedGate


class SigmaMoE(LearnedGate):
    """Top-b blocks of a learned linear gate, weighted by the sigmoids of their scores.

    Csordas et al. 2023 (arXiv 2310.10837, section 5). The balance loss is minus the entropy of the
    mean softmax over the batch.

    In training, expert dropout leaves out each block with a small probability, for all tokens of
    the batch. At least as many blocks are left as a token uses. Gate and losses read the scores of
    all blocks. The ranks that share tokens leave out the same blocks: those that the first rank
    draws from PyTorch's generator. The second pass of activation checkpointing restores the
    generator, and so leaves out the same blocks.
    """

    name = "sigma_moe"
    default_gate = "sigmoid"
    default_balance_weight = 1e-3
    balance_loss_kind = "entropy"

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        expert_dropout: float = field(
            default=0.05,
            metadata={
                "help": "probability of leaving out a block in training, for all tokens of a "
                "micro-batch"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.expert_dropout = config.selector_options.expert_dropout

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        # The paper's size does not divide the default widths of gated FFNs.
        return 64 if ffn_embed_dim % 128 else 128

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        probability = config.selector_options.expert_dropout
        if not 0 <= probability < 1:
            raise ConfigError("expert_dropout", probability, "must be at least 0 and below 1")

    def forward(self, inputs: SelectorInput) -> Selection:
        scores = left = self.scores(inputs)
        if self.training and self.expert_dropout:
            left = Scores(scores.logits.masked_fill(self.draw_left_out(inputs), -torch.inf))
        return Selection(inputs.top(left, self.active_blocks), scores)

    def draw_left_out(self, inputs: SelectorInput) -> Tensor:
        """Draw the blocks to leave out: (B,) bool."""
        draws_B = torch.rand(self.num_blocks, device=inputs.x.device)
        draws_B = inputs.stack_over_tokens(draws_B)[0]
        left_out_B = draws_B < self.expert_dropout
        return left_out_B.index_fill(0, draws_B.topk(self.active_blocks).indices, False)
