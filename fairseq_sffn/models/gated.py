"""Transformer layers whose feed-forward network is dense and gated.

They are the dense layers of a model with ``--sffn-glu``, whose sparse layers have gated cells.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from ..errors import UsageError
from ..memory.activations import ACTIVATIONS
from .layer import identity
from .stack import wrap_layer

WIDTH_MULTIPLE = 64
"""The default width of a gated FFN is a multiple of this."""


def ffn_width(args: Any, side: str) -> int:
    """Return the width of a model's FFNs: the FFN width, or the width of gated FFNs.

    The latter is ``sffn_glu_width``, or two thirds of the FFN width, to the nearest multiple of 64.
    The three matrices of a gated FFN then have as many parameters as the two of a plain one
    (Shazeer 2020, arXiv 2002.05202).

    Args:
        args: the model's options.
        side: ``encoder`` or ``decoder``.

    Raises:
        UsageError: the given width is below 1, or FFNs are not gated.
    """
    plain: int = getattr(args, f"{side}_ffn_embed_dim")
    given: int | None = getattr(args, "sffn_glu_width", None)
    if getattr(args, "sffn_glu", None) is None:
        if given is not None:
            raise UsageError(f"--sffn-glu-width {given}: needs --sffn-glu")
        return plain
    if given is None:
        return default_gated_width(plain)
    if given < 1:
        raise UsageError(f"--sffn-glu-width {given}: must be at least 1")
    return given


def default_gated_width(plain: int) -> int:
    """Return two thirds of the width of a plain FFN, to the nearest multiple of 64, at least 64."""
    return WIDTH_MULTIPLE * max(1, round(plain * 2 / 3 / WIDTH_MULTIPLE))


class GatedLinear(nn.Module):
    """f(gate_proj(x)) * up_proj(x), in place of the first linear map of an FFN and its activation.

    Shazeer 2020 (arXiv 2002.05202). The names are those of the Llama models.

    Args:
        gate_proj, up_proj: linear maps of the same shape.
        activation: f, elementwise.
    """

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.activation = gate_proj, up_proj, activation

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return output


class GatedLayer(nn.Module):
    """Base class to put before one of fairseq's layers: makes its feed-forward network gated.

    Args:
        cfg: fairseq's ``TransformerConfig``, whose FFN width is that of the gated FFN.
        glu: name of f, see :class:`~..memory.MemoryConfig`.
    """

    def __init__(self, cfg: Any, glu: str, **kwargs: Any) -> None:
        self.glu = glu
        super().__init__(cfg, **kwargs)
        self.activation_fn = identity  # GatedLinear applies it

    def build_fc1(self, *args: Any) -> GatedLinear:
        build: Callable[..., nn.Module] = super().build_fc1  # type: ignore[misc]
        return GatedLinear(build(*args), build(*args), ACTIVATIONS[self.glu])


class GatedEncoderLayer(GatedLayer, TransformerEncoderLayerBase):
    """fairseq's encoder layer with a gated feed-forward network."""


class GatedDecoderLayer(GatedLayer, TransformerDecoderLayerBase):
    """fairseq's decoder layer with a gated feed-forward network."""


class GatedTransformerEncoder(TransformerEncoder):
    """fairseq's encoder, whose feed-forward networks are gated with ``args.sffn_glu``."""

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        if self.args.sffn_glu is None:
            return super().build_encoder_layer(cfg)
        cfg = copy.deepcopy(TransformerConfig.from_namespace(cfg))
        cfg.encoder.ffn_embed_dim = ffn_width(self.args, "encoder")
        return wrap_layer(GatedEncoderLayer(cfg, str(self.args.sffn_glu)), cfg)


class GatedTransformerDecoder(TransformerDecoder):
    """fairseq's decoder, whose feed-forward networks are gated with ``args.sffn_glu``."""

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        if self.args.sffn_glu is None:
            return super().build_decoder_layer(cfg, no_encoder_attn)
        cfg = copy.deepcopy(TransformerConfig.from_namespace(cfg))
        cfg.decoder.ffn_embed_dim = ffn_width(self.args, "decoder")
        layer = GatedDecoderLayer(cfg, str(self.args.sffn_glu), no_encoder_attn=no_encoder_attn)
        return wrap_layer(layer, cfg)
