"""A Transformer decoder in which every n-th layer is sparse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from ..errors import UsageError
from ..memory import MemoryConfig
from .layer import LayerRouting, SparseDecoderLayer


class SparseTransformerDecoder(TransformerDecoder):
    """fairseq's decoder with sparse layers, which it tells the token ids and padding.

    ``forward`` returns, in the second of its two outputs, ``routing``: the
    :class:`~.layer.LayerRouting` of each sparse layer, by layer number.

    Args:
        args: the model's :class:`~.config.SparseConfig`.
        memory_config: the memory of each sparse layer.
    """

    def __init__(
        self,
        args: Any,
        dictionary: Any,
        embed_tokens: nn.Module,
        memory_config: MemoryConfig,
        no_encoder_attn: bool = False,
    ) -> None:
        self.memory_config = memory_config
        # Layers are numbered as they were trained, also where only some are kept.
        kept = args.decoder_layers_to_keep
        self.layer_numbers = (
            [int(number) for number in kept.split(",")]
            if kept
            else list(range(args.decoder_layers))
        )
        self.sparse_layers = [
            index
            for index, number in enumerate(self.layer_numbers)
            if (number + 1) % args.sffn_freq == 0
        ]
        self._unbuilt_layers = iter(range(len(self.layer_numbers)))
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        if next(self._unbuilt_layers) not in self.sparse_layers:
            return super().build_decoder_layer(cfg, no_encoder_attn)
        cfg = TransformerConfig.from_namespace(cfg)
        layer: nn.Module = SparseDecoderLayer(cfg, self.memory_config, no_encoder_attn)
        if cfg.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        # As fairseq does: FSDP always wraps a checkpointed layer.
        min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
        return fsdp_wrap(layer, min_num_params=min_params)

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        self._check_tokens(prev_output_tokens)
        context = max(self.memory_config.context_tokens, 1)
        token_ids_BTC = trailing_tokens(prev_output_tokens, context, self.padding_idx)
        if incremental_state is not None:
            token_ids_BTC = token_ids_BTC[:, -1:]
        token_ids_TBC = token_ids_BTC.transpose(0, 1)
        padding_TB = token_ids_TBC[..., -1].eq(self.padding_idx)
        with self._routed(token_ids_TBC, padding_TB) as routing:
            features, extra = super().extract_features(
                prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
            )
        empty = LayerRouting.empty(self.memory_config.num_blocks, like=features)
        extra["routing"] = {
            self.layer_numbers[index]: routing.get(index, empty) for index in self.sparse_layers
        }
        return features, extra

    def _check_tokens(self, tokens: Tensor) -> None:
        # An accelerator checks indices by itself, and asking it would stall it.
        if tokens.device.type == "cpu" and tokens.numel():
            types, highest = self.memory_config.vocab_size, int(tokens.max())
            if highest >= types:
                raise UsageError(
                    f"token id {highest}: outside the dictionary of {types} types; "
                    "the data was binarised with another dict.txt"
                )

    @contextmanager
    def _routed(
        self, token_ids_TBC: Tensor, padding_TB: Tensor
    ) -> Iterator[dict[int, LayerRouting]]:
        """While open, sparse layers are called with the tokens, and what they return beyond
        fairseq's three outputs is collected here: fairseq's loop over the layers knows neither."""
        collected: dict[int, LayerRouting] = {}

        def attach(index: int, stack: ExitStack) -> None:
            def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                return args, {**kwargs, "token_ids": token_ids_TBC, "padding_mask": padding_TB}

            def take(module: nn.Module, args: Any, outputs: tuple[Any, ...]) -> Any:
                collected[index] = LayerRouting(*outputs[3:])
                return outputs[:3]

            layer = self.layers[index]
            stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(take).remove)

        with ExitStack() as stack:
            for index in self.sparse_layers:
                attach(index, stack)
            yield collected


def trailing_tokens(tokens_BT: Tensor, context: int, padding_idx: int) -> Tensor:
    """The ``context`` token ids that end at each position: (B, T, context), padded at the start."""
    batch, length = tokens_BT.shape
    start = tokens_BT.new_full((batch, context - 1), padding_idx)
    padded = torch.cat([start, tokens_BT], dim=1)
    return torch.stack([padded[:, i : i + length] for i in range(context)], dim=2)
