"""Common base of sparse encoders and decoders: the choice and the calls of sparse layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from ..errors import UsageError
from ..memory import MemoryConfig
from .layer import LayerRouting
from .process_groups import process_groups


class SparseStack(nn.Module):
    """Base class to put before fairseq's encoder or decoder: some of its layers are sparse.

    Attributes:
        memory_configs: name of each sparse layer in the routing -> its memory.
        sparse_layers: index of each sparse layer -> its name in the routing.
        groups: the processes among which tokens count together and blocks are sharded.
    """

    layers: nn.ModuleList
    padding_idx: int

    def plan_layers(
        self, args: Any, side: str, memory_configs: Mapping[int, MemoryConfig], prefix: str
    ) -> None:
        """Decide which layers are sparse. Call it before the layers are built in order.

        Args:
            args: the model's options.
            side: ``encoder`` or ``decoder``.
            memory_configs: number of each sparse layer in training -> its memory.
            prefix: a layer's name is this prefix and the layer's number.
        """
        self.groups = process_groups(args.sffn_expert_parallel).groups
        # Layers of a pruned model keep their numbers of training, and their order.
        kept = getattr(args, f"{side}_layers_to_keep")
        built = map(int, kept.split(",")) if kept else range(getattr(args, f"{side}_layers"))
        numbers = sorted(built)
        self.sparse_layers = {
            index: f"{prefix}{number}"
            for index, number in enumerate(numbers)
            if number in memory_configs
        }
        self.memory_configs = {
            name: memory_configs[numbers[index]] for index, name in self.sparse_layers.items()
        }
        self._unbuilt_layers = iter(range(len(numbers)))

    def next_memory(self) -> MemoryConfig | None:
        """Return the memory of the next layer to build, and advance to the layer after it.

        Returns:
            The memory; ``None``: the layer is dense.
        """
        name = self.sparse_layers.get(next(self._unbuilt_layers))
        return None if name is None else self.memory_configs[name]

    def routing_inputs(
        self,
        tokens_BT: Tensor,
        losses: bool,
        is_dummy: bool,
        balance_scope: str,
        last_only: bool = False,
    ) -> dict[str, Any]:
        """Return the arguments of sparse layers besides those of fairseq.

        Args:
            tokens_BT: (B, T) token ids.
            losses: whether to compute balance and z losses.
            is_dummy: whether the tokens count nowhere.
            balance_scope: see :meth:`~..memory.SparseMemory.forward`.
            last_only: whether the layers compute only the last position (incremental decoding).

        Raises:
            UsageError: a token id is outside the dictionary.
        """
        self._check_tokens(tokens_BT)
        # A memory takes the last ones, as many as it reads.
        context = max((c.context_tokens for c in self.memory_configs.values()), default=0)
        token_ids_BTC = trailing_tokens(tokens_BT, max(context, 1), self.padding_idx)
        if last_only:
            token_ids_BTC = token_ids_BTC[:, -1:]
        token_ids_TBC = token_ids_BTC.transpose(0, 1)
        padding_TB = token_ids_TBC[..., -1].eq(self.padding_idx)
        if is_dummy:
            padding_TB = torch.ones_like(padding_TB)
        device = tokens_BT.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return dict(
            token_ids=token_ids_TBC,
            padding_mask=padding_TB,
            losses=losses,
            balance_scope=balance_scope,
            autocast=autocast,
        )

    def empty_routing(self, tokens: Tensor) -> dict[str, LayerRouting]:
        """Return name of each sparse layer -> routing of no tokens, on the device of ``tokens``."""
        return {
            name: LayerRouting.empty(config.routed_blocks, like=tokens)
            for name, config in self.memory_configs.items()
        }

    def routed_layers(
        self, inputs: dict[str, Any], routing: dict[str, LayerRouting]
    ) -> Iterator[Callable[..., Any]]:
        """Yield the layers in order for fairseq's loop, without those that LayerDrop skips.

        Args:
            inputs: arguments of sparse layers besides those of fairseq.
            routing: name of the layer -> routing. A sparse layer that runs replaces its entry.
        """
        names = {self.layers[index]: name for index, name in self.sparse_layers.items()}
        ours = len(LayerRouting._fields)

        def run_sparse(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            outputs = layer(*args, **kwargs, **inputs)
            routing[names[layer]] = LayerRouting(*outputs[-ours:])
            return outputs[:-ours] if len(outputs) > ours + 1 else outputs[0]

        for layer in self.layers:
            yield partial(run_sparse, layer) if layer in names else layer

    def _check_tokens(self, tokens: Tensor) -> None:
        # An accelerator checks indices itself. A check here would make the host wait.
        if self.memory_configs and tokens.device.type == "cpu" and tokens.numel():
            # All layers read the same dictionary.
            types = next(iter(self.memory_configs.values())).vocab_size
            assert types is not None
            if (highest := int(tokens.max())) >= types:
                raise UsageError(
                    f"token id {highest}: outside the dictionary of {types} types; "
                    "the data was binarised with another dict.txt"
                )


def wrap_layer(layer: nn.Module, cfg: Any) -> nn.Module:
    """Wrap a layer for activation checkpointing and FSDP, as fairseq wraps its own layers."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
    return fsdp_wrap(layer, min_num_params=min_params)


def trailing_tokens(tokens_BT: Tensor, context: int, padding_idx: int) -> Tensor:
    """Return the last ``context`` token ids at each position: (B, T, context), padded at the start.

    Args:
        tokens_BT: (B, T) token ids.
        context: number of token ids, the one at the position included.
        padding_idx: id before the first token.
    """
    batch, length = tokens_BT.shape
    start = tokens_BT.new_full((batch, context - 1), padding_idx)
    padded = torch.cat([start, tokens_BT], dim=1)
    return torch.stack([padded[:, i : i + length] for i in range(context)], dim=2)
