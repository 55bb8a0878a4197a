"""A Transformer decoder in which every n-th layer is sparse.

The path of a token, down and up: ``extract_features`` makes the routing inputs of a forward pass
(token ids, padding mask, whether losses are wanted). fairseq's loop over the layers calls each
sparse one with them (:meth:`.stack.SparseStack.routed_layers`). The layer hands them to its memory
and returns the :class:`.layer.LayerRouting` behind fairseq's outputs. ``extract_features`` returns
them by the layers' names, in the model's output, where the criterion finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from torch import Tensor, nn

from ..memory import MemoryConfig
from .layer import SparseDecoderLayer
from .overlay import Overlay
from .stack import SparseStack


class SparseTransformerDecoder(SparseStack, TransformerDecoder):
    """fairseq's decoder with sparse layers.

    Args:
        args: the model's options (:class:`~.config.SparseOptions` among them).
        dictionary: the target dictionary.
        embed_tokens: the input embedding.
        memory_config: the memory of each sparse layer.
        no_encoder_attn: whether the decoder is without attention to an encoder.
        prefix: a layer's name in the routing is the prefix and its number.
    """

    output_layer: Callable[[Tensor], Tensor]

    def __init__(
        self,
        args: Any,
        dictionary: Any,
        embed_tokens: nn.Module,
        memory_config: MemoryConfig,
        no_encoder_attn: bool = False,
        prefix: str = "layer",
    ) -> None:
        self.plan_layers(args, "decoder", memory_config, prefix)
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        if not self.next_is_sparse():
            return super().build_decoder_layer(cfg, no_encoder_attn)
        cfg = TransformerConfig.from_namespace(cfg)
        layer = SparseDecoderLayer(
            cfg, self.memory_config, self.groups, no_encoder_attn=no_encoder_attn
        )
        return self.wrap(layer, cfg)

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, Any] | None = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        full_context_alignment: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
        src_lengths: Any = None,
        return_all_hiddens: bool = False,
        *,
        routing_losses: bool = False,
        is_dummy: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run the decoder; see :meth:`extract_features` for what differs from fairseq's.

        Returns:
            (B, T, V) logits, or (B, T, D) features if ``features_only``, and the extra outputs.
        """
        features, extra = self.extract_features(
            prev_output_tokens,
            encoder_out,
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
            routing_losses=routing_losses,
            is_dummy=is_dummy,
        )
        return features if features_only else self.output_layer(features), extra

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, Any] | None = None,
        incremental_state: dict[str, Any] | None = None,
        full_context_alignment: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
        *,
        routing_losses: bool = False,
        is_dummy: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run the layers.

        Args:
            prev_output_tokens: (B, T) token ids.
            encoder_out: what the encoder returned.
            incremental_state: fairseq's cache, in which case only the last position is computed.
            routing_losses: whether balance and z losses are wanted. They take a softmax over all
                blocks, and in several processes all must then run together.
            is_dummy: whether the tokens stand for none: a rank without sentences left takes part in
                every exchange with tokens that count nowhere.

        Returns:
            (B, T, D) features and fairseq's extra outputs with ``routing``: the
            :class:`.layer.LayerRouting` of each sparse layer by name, the encoder's included.

        Raises:
            UsageError: a token id is outside the dictionary.
        """
        last_only = incremental_state is not None
        inputs = self.routing_inputs(prev_output_tokens, routing_losses, is_dummy, last_only)
        routing = self.empty_routing(prev_output_tokens)
        features, extra = TransformerDecoder.extract_features_scriptable(
            Overlay(self, layers=self.routed_layers(inputs, routing)),
            prev_output_tokens,
            encoder_out,
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
        )
        return features, {**extra, "routing": (encoder_out or {}).get("routing", {}) | routing}
