"""A Transformer encoder in which every n-th layer is sparse."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerEncoder
from torch import Tensor, nn

from ..memory import MemoryConfig
from .layer import SparseEncoderLayer
from .stack import SparseStack


class SparseTransformerEncoder(SparseStack, TransformerEncoder):
    """fairseq's encoder with sparse layers.

    ``forward`` returns, beside what fairseq's does, ``routing``: the
    :class:`~.layer.LayerRouting` of each sparse layer by name.

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
        prefix: str = "layer",
    ) -> None:
        self.plan_layers(args, "encoder", memory_config, prefix)
        super().__init__(args, dictionary, embed_tokens)

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        if not self.next_is_sparse():
            return super().build_encoder_layer(cfg)
        cfg = TransformerConfig.from_namespace(cfg)
        return self.wrap(SparseEncoderLayer(cfg, self.memory_config, self.groups), cfg)

    def forward(self, src_tokens: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with self.routed(src_tokens) as routing:
            encoder_out = super().forward(src_tokens, *args, **kwargs)
        return {**encoder_out, "routing": routing}
