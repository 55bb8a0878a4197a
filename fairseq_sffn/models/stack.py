"""What sparse encoders and decoders share: which layers are sparse, and what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from ..errors import UsageError
from ..memory import MemoryConfig
from .layer import LayerRouting, SparseLayer
from .process_groups import process_groups


class SparseStack(nn.Module):
    """Goes before fairseq's encoder or decoder among the bases of a class. Its layers are built in
    order, and some of them sparse.

    Attributes:
        memory_config: the memory of each sparse layer.
        sparse_layers: index of each sparse layer -> its name in the routing.
        losses: whether the routing has balance and z losses, for which all processes of a job must
            run together. Only who reads them asks for them (a criterion, for as long as it runs).
        is_dummy: whether the next tokens stand for none: a rank that has run out of sentences takes
            part in every exchange with some that count nowhere.
        groups: with which other processes tokens and blocks are shared.
    """

    losses = False
    is_dummy = False

    layers: nn.ModuleList
    padding_idx: int

    def plan_layers(self, args: Any, side: str, memory_config: MemoryConfig, prefix: str) -> None:
        """To be called before the layers are built.

        Args:
            args: the model's options.
            side: ``encoder`` or ``decoder``.
            prefix: layers are named by it and their number.
        """
        self.memory_config = memory_config
        self.groups = process_groups(args.sffn_expert_parallel).groups
        # Layers are numbered as they were trained, also where only some are kept, which fairseq
        # does in their order.
        kept = getattr(args, f"{side}_layers_to_keep")
        numbers = sorted(int(number) for number in kept.split(",")) if kept else None
        numbers = numbers or range(getattr(args, f"{side}_layers"))
        self.sparse_layers = {
            index: f"{prefix}{number}"
            for index, number in enumerate(numbers)
            if (number + 1) % args.sffn_freq == 0
        }
        self._unbuilt_layers = iter(range(len(numbers)))

    def next_is_sparse(self) -> bool:
        """Whether the layer that is built now is a sparse one."""
        return next(self._unbuilt_layers) in self.sparse_layers

    def wrap(self, layer: SparseLayer, cfg: Any) -> nn.Module:
        """Wraps a layer as fairseq wraps its own: FSDP always wraps a checkpointed one."""
        wrapped: nn.Module = layer
        if cfg.checkpoint_activations:
            wrapped = checkpoint_wrapper(wrapped, offload_to_cpu=cfg.offload_activations)
        min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
        return fsdp_wrap(wrapped, min_num_params=min_params)

    @contextmanager
    def routed(
        self, tokens_BT: Tensor, last_only: bool = False
    ) -> Iterator[dict[str, LayerRouting]]:
        """While open, sparse layers are called with the tokens, and what they return beyond
        fairseq's outputs is collected: fairseq's loop over the layers knows neither.

        Args:
            tokens_BT: token ids.
            last_only: the layers compute the last position only (incremental decoding).

        Yields:
            the routing of each sparse layer by name, complete when closed.

        Raises:
            UsageError: a token id is outside the dictionary.
        """
        self._check_tokens(tokens_BT)
        context = max(self.memory_config.context_tokens, 1)
        token_ids_BTC = trailing_tokens(tokens_BT, context, self.padding_idx)
        if last_only:
            token_ids_BTC = token_ids_BTC[:, -1:]
        token_ids_TBC = token_ids_BTC.transpose(0, 1)
        padding_TB = token_ids_TBC[..., -1].eq(self.padding_idx)
        if self.is_dummy:
            padding_TB = torch.ones_like(padding_TB)
        lent = dict(token_ids=token_ids_TBC, padding_mask=padding_TB, losses=self.losses)
        device = tokens_BT.device.type
        if torch.is_autocast_enabled(device):
            lent["autocast"] = torch.get_autocast_dtype(device)
        # Layers that are skipped (LayerDrop) keep this.
        empty = LayerRouting.empty(self.memory_config.num_blocks, like=tokens_BT)
        collected = dict.fromkeys(self.sparse_layers.values(), empty)

        def attach(layer: nn.Module, name: str, stack: ExitStack) -> None:
            def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                return args, {**kwargs, **lent}

            def take(module: nn.Module, args: Any, outputs: tuple[Any, ...]) -> Any:
                extra = len(LayerRouting._fields)
                collected[name] = LayerRouting(*outputs[-extra:])
                return outputs[:-extra] if len(outputs) > extra + 1 else outputs[0]

            stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(take).remove)

        with ExitStack() as stack:
            for index, name in self.sparse_layers.items():
                attach(self.layers[index], name, stack)
            yield collected

    def _check_tokens(self, tokens: Tensor) -> None:
        # An accelerator checks indices by itself, and asking it would stall it.
        if tokens.device.type == "cpu" and tokens.numel():
            types, highest = self.memory_config.vocab_size, int(tokens.max())
            if highest >= types:
                raise UsageError(
                    f"token id {highest}: outside the dictionary of {types} types; "
                    "the data was binarised with another dict.txt"
                )


def trailing_tokens(tokens_BT: Tensor, context: int, padding_idx: int) -> Tensor:
    """The ``context`` token ids that end at each position: (B, T, context), padded at the start."""
    batch, length = tokens_BT.shape
    start = tokens_BT.new_full((batch, context - 1), padding_idx)
    padded = torch.cat([start, tokens_BT], dim=1)
    return torch.stack([padded[:, i : i + length] for i in range(context)], dim=2)
