"""PKM: product keys whose scores are the coefficients of the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..config import MemoryConfig
from ..selection import Selection, SelectorInput
from ..validation import ConfigError
from .product_keys import ProductKeys


class PKM(ProductKeys):
    """Product-key memory (Lample et al. 2019, arXiv 1907.05242).

    Each head selects the cells with its highest product-key scores, and sums their values weighted
    by the scores. A cell that several heads select counts several times.
    """

    name = "pkm"
    key_table = "own"

    @dataclass(frozen=True)
    class Config(ProductKeys.Config):
        heads: int = field(
            default=4,
            metadata={"help": "query heads; each takes active blocks / heads cells"},
        )
        coefficients: Literal["softmax", "activation"] = field(
            default="softmax",
            metadata={
                "help": "what multiplies the values: the softmax of a head's selected scores, or "
                "the FFN's activation of each score"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.uses_softmax = config.selector_options.coefficients == "softmax"

    @classmethod
    def _heads(cls, config: MemoryConfig) -> int:
        return config.selector_options.heads

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        heads = config.selector_options.heads
        if heads < 1 or config.active_blocks % heads:
            reason = f"does not divide the {config.active_blocks} active blocks"
            raise ConfigError("heads", heads, reason)
        super().validate(config)

    def forward(self, inputs: SelectorInput) -> Selection:
        scores = self.scores(inputs.x)
        blocks_NA = inputs.top(scores, self.active_blocks)
        selected_NA = scores.of(blocks_NA)
        if not self.uses_softmax:
            return Selection(blocks_NA, scores, pre_activations=selected_NA.unsqueeze(2))
        by_rank_NaH = selected_NA.unflatten(1, (-1, len(self.left)))
        return Selection(blocks_NA, scores, coefficients=by_rank_NaH.softmax(dim=1).flatten(1))
