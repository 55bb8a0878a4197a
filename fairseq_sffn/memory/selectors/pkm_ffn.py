"""PKM-FFN: product keys select cells of a full key table."""

from __future__ import annotations

from ..selection import Selection, SelectorInput
from .product_keys import ProductKeys


class PKMFFN(ProductKeys):
    """The cells with the highest product-key scores, computed from the full key table.

    Product keys are the gate only (Liu et al. 2023, arXiv 2305.13999). By default the weight of a
    cell is the logistic function of its score. Without a weight the query network would get no
    gradient, and a softmax over thousands of cells gives weights near 0.
    """

    name = "pkm_ffn"
    default_gate = "sigmoid"

    def forward(self, inputs: SelectorInput) -> Selection:
        scores = self.scores(inputs.x)
        return Selection(inputs.top(scores, self.active_blocks), scores)
