"""A Transformer encoder in which some layers are sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerEncoder
from torch import Tensor, nn

from ..memory import MemoryConfig
from .gated import GatedTransformerEncoder
from .layer import SparseEncoderLayer
from .overlay import Overlay
from .stack import SparseStack, wrap_layer


class SparseTransformerEncoder(SparseStack, GatedTransformerEncoder):
    """fairseq's encoder with sparse layers.

    Args:
        args: the model's options, which include :class:`~.config.SparseOptions`.
        dictionary: the source dictionary.
        embed_tokens: the input embedding.
        memory_configs: number of each sparse layer in training -> its memory.
        prefix: a layer's name in the routing is this prefix and the layer's number.
    """

    def __init__(
        self,
        args: Any,
        dictionary: Any,
        embed_tokens: nn.Module,
        memory_configs: Mapping[int, MemoryConfig],
        prefix: str = "layer",
    ) -> None:
        self.plan_layers(args, "encoder", memory_configs, prefix)
        super().__init__(args, dictionary, embed_tokens)

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        if (memory := self.next_memory()) is None:
            return super().build_encoder_layer(cfg)
        cfg = TransformerConfig.from_namespace(cfg)
        return wrap_layer(SparseEncoderLayer(cfg, memory, self.groups), cfg)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
        *,
        routing_losses: bool = False,
        is_dummy: bool = False,
        balance_scope: str = "micro",
    ) -> dict[str, Any]:
        """Run the encoder.

        Args:
            src_tokens: (B, T) token ids.
            src_lengths, return_all_hiddens, token_embeddings: see fairseq's encoder.
            routing_losses, is_dummy, balance_scope: see the decoder's ``extract_features``.

        Returns:
            fairseq's outputs with ``routing``: name of each sparse layer -> its
            :class:`.layer.LayerRouting`.

        Raises:
            UsageError: a token id is outside the dictionary.
        """
        routing = self.empty_routing(src_tokens)
        inputs = self.routing_inputs(src_tokens, routing_losses, is_dummy, balance_scope)
        encoder_out = TransformerEncoder.forward_scriptable(
            Overlay(self, layers=self.routed_layers(inputs, routing)),
            src_tokens,
            src_lengths,
            return_all_hiddens,
            token_embeddings,
        )
        return {**encoder_out, "routing": routing}
