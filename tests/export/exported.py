"""Makes plain decoders from small models of fairseq, and a cache for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fairseq_sffn.export.decoder import Decoder
from fairseq_sffn.export.description import describe
from fairseq_sffn.tools.export import exported_tensors
from tests.models.small_lm import build, small_config


class PlainCache:
    """Keys and values of past positions."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.stored[0][0].shape[2] if self.stored else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        new = (keys, values)
        old = self.stored.get(layer)
        self.stored[layer] = new if old is None else tuple(map(concatenate, old, new))  # type: ignore[assignment]
        return self.stored[layer]


def concatenate(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old, new], dim=2)


def pair(method: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Decoder]:
    """Build a model of fairseq with random buffers, and the plain decoder with its tensors."""
    sizes = {} if method == "mixed" else dict(decoder_layers=3)
    if method not in ("dense", "mixed"):
        sizes["sffn_freq"] = 1
    config = small_config(method, **{**sizes, **options})
    model = build(config).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("layer_norm.weight", "ln.weight", "w_resid", "c_attn")):
                tensor.uniform_(0.5, 2)
            elif name.endswith((".bias", "hidden_totals")):  # also of the balancer
                tensor.normal_().abs_()
    return model, decoder_of(model, type(model).options(config), dtype)


def decoder_of(model: Any, options: Any, dtype: torch.dtype) -> Decoder:
    """Build the plain decoder with the tensors of a model."""
    description = describe(model, options)
    decoder = Decoder(SimpleNamespace(**description)).to(dtype).eval()
    tensors = exported_tensors(model, model.state_dict(), description["tied_embeddings"])
    decoder.load_state_dict(
        {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    )
    return decoder
