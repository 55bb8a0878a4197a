"""A Transformer decoder in which every n-th layer is sparse."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from torch import Tensor, nn

from ..memory import MemoryConfig
from .layer import SparseDecoderLayer
from .stack import SparseStack


class SparseTransformerDecoder(SparseStack, TransformerDecoder):
    """fairseq's decoder with sparse layers.

    ``forward`` returns, in the second of its two outputs, ``routing``: the
    :class:`~.layer.LayerRouting` of each sparse layer by name, the encoder's included.

    Args:
        args: the model's options (:class:`~.config.SparseOptions` among them).
        memory_config: the memory of each sparse layer.
        prefix: layers are named by it and their number.
    """

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

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        last_only = incremental_state is not None
        with self.routed(prev_output_tokens, last_only) as routing:
            features, extra = super().extract_features(
                prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
            )
        extra["routing"] = (encoder_out or {}).get("routing", {}) | routing
        return features, extra
