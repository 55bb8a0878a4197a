"""Transformer layers whose feed-forward network is dense and gated.

They are the dense layers of a model with ``--sffn-glu``, whose sparse layers have gated cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def gated_width(args: Any, side: str) -> int:
    """Return the width of a gated FFN.

    It is ``sffn_glu_width``, or two thirds of the FFN width, to the nearest multiple of 64. Its
    three matrices then have as many parameters as the two of the plain FFN (Shazeer 2020, arXiv
    2002.05202).

    Args:
        args: the model's options, with ``sffn_glu`` set.
        side: ``encoder`` or ``decoder``.

    Raises:
        UsageError: the given width is below 1.
    """
    width: int | None = args.sffn_glu_width
    if width is None:
        multiples = round(getattr(args, f"{side}_ffn_embed_dim") * 2 / 3 / WIDTH_MULTIPLE)
        return WIDTH_MULTIPLE * max(1, multiples)
    if width < 1:
        raise UsageError(f"--sffn-glu-width {width}: must be at least 1")
    return width


def set_gated_widths(args: Any, sides: Sequence[str]) -> None:
    """Replace the FFN widths of a model with ``sffn_glu`` by those of its gated FFNs.

    Args:
        args: the model's options, changed in place.
        sides: ``encoder``, ``decoder`` or both.

    Raises:
        UsageError: the given width is below 1, or the FFNs are not gated.
    """
    if args.sffn_glu is None:
        if args.sffn_glu_width is not None:
            raise UsageError(f"--sffn-glu-width {args.sffn_glu_width}: needs --sffn-glu")
        return
    for side in sides:
        setattr(args, f"{side}_ffn_embed_dim", gated_width(args, side))


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
        cfg = TransformerConfig.from_namespace(cfg)
        return wrap_layer(GatedEncoderLayer(cfg, str(self.args.sffn_glu)), cfg)


class GatedTransformerDecoder(TransformerDecoder):
    """fairseq's decoder, whose feed-forward networks are gated with ``args.sffn_glu``."""

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        if self.args.sffn_glu is None:
            return super().build_decoder_layer(cfg, no_encoder_attn)
        cfg = TransformerConfig.from_namespace(cfg)
        layer = GatedDecoderLayer(cfg, str(self.args.sffn_glu), no_encoder_attn=no_encoder_attn)
        return wrap_layer(layer, cfg)
