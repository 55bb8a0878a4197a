"""Transformer layers whose feed-forward network is a sparse memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from fairseq.modules import transformer_layer
from torch import Tensor, nn

from ..errors import UsageError
from ..memory import ConfigError, MemoryConfig, MemoryOutput, ProcessGroups, SparseMemory


class LayerRouting(NamedTuple):
    """What a sparse layer gives besides its output; see ``MemoryOutput``. All are tensors, so that
    they pass through activation checkpointing, whose first forward runs without gradients.

    Attributes:
        balance_loss, z_loss: (), 0 for a selector without scores, or where nobody asked for them.
        counts: (B,) assignments per block.
        dropped: () dropped assignments.
        importance: (B,) assignments by weight.
        sent: () bytes sent to other ranks.
    """

    balance_loss: Tensor
    z_loss: Tensor
    counts: Tensor
    dropped: Tensor
    importance: Tensor
    sent: Tensor

    @classmethod
    def empty(cls, num_blocks: int, like: Tensor) -> LayerRouting:
        """The routing of a layer that was skipped (LayerDrop)."""
        zero = like.new_zeros((), dtype=torch.float32)
        count = like.new_zeros((), dtype=torch.int64)
        counts_B = count.new_zeros(num_blocks)
        return cls(zero, zero, counts_B, count, counts_B.float(), count)


class SparseFFN(nn.Module):
    """Stands where a layer has its first linear map, and is the whole feed-forward network.

    fairseq's layer hands it the hidden states alone, so the layer lends it the rest in ``lent``
    for the time of one forward, and collects ``result``.
    """

    def __init__(self, config: MemoryConfig, groups: ProcessGroups | None = None) -> None:
        super().__init__()
        self.memory = SparseMemory(config, groups)
        self.lent: dict[str, Any] = {}
        self.result: MemoryOutput | None = None

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.result = self.memory(x, **self.lent)
        except ConfigError as error:
            if error.field != "engine":
                raise
            # One that cannot compute this type on this device, which is known only now.
            raise UsageError(f"--sffn-engine {error.value}: {error.reason}") from error
        return self.result.output


class SparseLayer(nn.Module):
    """Goes before one of fairseq's layers among the bases of a class, and makes its feed-forward
    network sparse.

    Args:
        cfg: fairseq's ``TransformerConfig``.
        memory_config: sizes and choices of the memory.
        groups: with which other processes it shares tokens and blocks.
    """

    fc1: SparseFFN

    def __init__(
        self,
        cfg: Any,
        memory_config: MemoryConfig,
        groups: ProcessGroups | None = None,
        **kwargs: Any,
    ) -> None:
        self.memory_config, self.groups = memory_config, groups
        super().__init__(cfg, **kwargs)
        # The memory applies activation and dropout itself, between its two halves.
        self.fc1.memory.dropout = self.activation_dropout_module
        self.activation_dropout_module = nn.Identity()
        self.activation_fn = _identity

    def build_fc1(self, *args: Any) -> SparseFFN:
        return SparseFFN(self.memory_config, self.groups)

    def build_fc2(self, *args: Any) -> nn.Module:
        return nn.Identity()

    def forward(
        self,
        x: Tensor,
        *args: Any,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        losses: bool = True,
        autocast: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """fairseq's forward, with the tokens to route by.

        Args:
            x: (T, B, D).
            token_ids: (T, B, context_tokens) trailing token ids.
            padding_mask: (T, B), ``True`` at padding.
            losses: whether balance and z loss are wanted.
            autocast: the type that it is to compute in, unless autocast is on already: fairseq's
                checkpointed layers are computed again without, and would select other blocks.

        Returns:
            fairseq's outputs, then the fields of :class:`LayerRouting`.
        """
        self.fc1.lent = dict(token_ids=token_ids, padding_mask=padding_mask, losses=losses)
        again = autocast is not None and not torch.is_autocast_enabled(x.device.type)
        try:
            with torch.autocast(x.device.type, autocast) if again else nullcontext():
                outputs = super().forward(x, *args, **kwargs)
            result = self.fc1.result
        finally:
            self.fc1.lent, self.fc1.result = {}, None
        assert result is not None
        empty = LayerRouting.empty(self.memory_config.num_blocks, like=x)
        routing = LayerRouting(
            empty.balance_loss if result.balance_loss is None else result.balance_loss,
            empty.z_loss if result.z_loss is None else result.z_loss,
            *result.usage,
        )
        return (*(outputs if isinstance(outputs, tuple) else (outputs,)), *routing)


class SparseEncoderLayer(SparseLayer, transformer_layer.TransformerEncoderLayerBase):
    """fairseq's encoder layer with a sparse feed-forward network."""


class SparseDecoderLayer(SparseLayer, transformer_layer.TransformerDecoderLayerBase):
    """fairseq's decoder layer with a sparse feed-forward network."""


def _identity(x: Tensor) -> Tensor:
    return x
