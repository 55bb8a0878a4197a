"""PKM-FFN: product keys choose cells of a full key table."""

from __future__ import annotations

from ..selection import Selection, SelectorInput
from .product_keys import ProductKeys


class PKMFFN(ProductKeys):
    """The cells with the highest product-key scores, computed from keys of their own: product keys
    are the gate alone (Liu et al. 2023, arXiv 2305.13999).

    By default the logistic function of its score weighs a cell: without a weight the query network
    would get no gradient, and a softmax over thousands of cells would leave next to nothing.
    """

    name = "pkm_ffn"
    default_gate = "sigmoid"

    def forward(self, inputs: SelectorInput) -> Selection:
        scores = self.scores(inputs.x)
        return Selection(scores.top(self.active_blocks), scores)
