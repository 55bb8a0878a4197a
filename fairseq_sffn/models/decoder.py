"""A Transformer decoder in which some layers are sparse.

The path of a token, down and up:

1. ``extract_features`` makes the routing inputs of a forward pass: token ids, padding mask, and
   whether losses are wanted.
2. fairseq's loop over the layers calls each sparse layer with these inputs
   (:meth:`.stack.SparseStack.routed_layers`).
3. The layer passes them to its memory, and returns a :class:`.layer.LayerRouting` after fairseq's
   outputs.
4. ``extract_features`` returns the routing of all layers by name in the model's output. The
   criterion reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from torch import Tensor, nn

from ..memory import MemoryConfig
from .gated import GatedTransformerDecoder
from .layer import SparseDecoderLayer
from .overlay import Overlay
from .stack import SparseStack, wrap_layer


class SparseTransformerDecoder(SparseStack, GatedTransformerDecoder):
    """fairseq's decoder with sparse layers.

    Args:
        args: the model's options, which include :class:`~.config.SparseOptions`.
        dictionary: the target dictionary.
        embed_tokens: the input embedding.
        memory_configs: number of each sparse layer in training -> its memory.
        no_encoder_attn: whether the decoder has no attention to an encoder.
        prefix: a layer's name in the routing is this prefix and the layer's number.
    """

    output_layer: Callable[[Tensor], Tensor]

    def __init__(
        self,
        args: Any,
        dictionary: Any,
        embed_tokens: nn.Module,
        memory_configs: Mapping[int, MemoryConfig],
        no_encoder_attn: bool = False,
        prefix: str = "layer",
    ) -> None:
        self.plan_layers(args, "decoder", memory_configs, prefix)
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        if (memory := self.next_memory()) is None:
            return super().build_decoder_layer(cfg, no_encoder_attn)
        cfg = TransformerConfig.from_namespace(cfg)
        layer = SparseDecoderLayer(cfg, memory, self.groups, no_encoder_attn=no_encoder_attn)
        return wrap_layer(layer, cfg)

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
        balance_scope: str = "micro",
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run the decoder. :meth:`extract_features` describes the additional arguments.

        Returns:
            (B, T, V) logits, or (B, T, D) features with ``features_only``; and the extra outputs.
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
            balance_scope=balance_scope,
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
        balance_scope: str = "micro",
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run the layers.

        Args:
            prev_output_tokens: (B, T) token ids.
            encoder_out: outputs of the encoder.
            incremental_state: fairseq's cache. With it, only the last position is computed.
            full_context_alignment, alignment_layer, alignment_heads: see fairseq's decoder.
            routing_losses: whether to compute balance and z losses. They take a softmax over all
                blocks. In several processes, all of them must then run together.
            is_dummy: whether the tokens count nowhere. A rank without sentences runs such tokens to
                take part in every exchange.
            balance_scope: tokens of one balance loss; see :meth:`~..memory.SparseMemory.forward`.

        Returns:
            (B, T, D) features, and fairseq's extra outputs with ``routing``: name of each sparse
            layer, also of the encoder -> its :class:`.layer.LayerRouting`.

        Raises:
            UsageError: a token id is outside the dictionary.
        """
        last_only = incremental_state is not None
        inputs = self.routing_inputs(
            prev_output_tokens, routing_losses, is_dummy, balance_scope, last_only
        )
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
