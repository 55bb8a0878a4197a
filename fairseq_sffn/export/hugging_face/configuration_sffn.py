"""The configuration of an exported language model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class SFFNConfig(PretrainedConfig):
    """The values that ``fairseq-sffn export`` writes, as attributes.

    Besides transformers' own, these are the attributes of the decoder, the weights of the losses
    that training adds (``balance_loss_weights``, ``z_loss_weights``, ``balance_loss_scope``), and
    ``fairseq``: the configuration of the training, for ``fairseq-sffn import``.
    """

    model_type = "fairseq_sffn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(self, **kwargs: Any) -> None:
        # The embedding is used twice without a parameter that is tied.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
