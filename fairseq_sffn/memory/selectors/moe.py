"""MoE: the fine-grained mixture of experts of today."""

from .learned_gate import LearnedGate


class MoE(LearnedGate):
    """Top-b blocks of a learned linear gate, weighted by renormalised sigmoids of their scores.

    Experts are small blocks, of which a token uses many (DeepSeekMoE, arXiv 2401.06066). The weight
    of a block is sigmoid(score) over the sum for the selected blocks (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2).
    """

    name = "moe"
    default_gate = "sigmoid_renormalized"

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 64
