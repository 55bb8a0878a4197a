"""Transformer layers whose feed-forward network is a sparse memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from ..errors import UsageError
from ..memory import ConfigError, MemoryConfig, MemoryOutput, ProcessGroups, SparseMemory
from .overlay import Overlay

KNOWN_LATE = {"engine": "--sffn-engine", "shards": "--sffn-expert-parallel"}
"""Fields of a memory that a forward pass may refuse -> their flags."""


class LayerRouting(NamedTuple):
    """Outputs of a sparse layer besides its hidden states; see :class:`~..memory.MemoryOutput`.

    All fields are tensors, because activation checkpointing passes tensors only.

    Attributes:
        balance_loss: () load-balancing loss; 0 for a selector without scores, or if not computed.
        z_loss: () mean squared log-sum-exp of the scores; 0 in the same cases.
        counts: (B,) assignments per block that is not shared.
        dropped: () dropped assignments.
        importance: (B,) sum of the weights of the assignments per block.
        sent: () bytes sent to other ranks.
        scored, routed_mass, entropy: () tokens whose scores are summed in the next two, the sum of
            the shares of their blocks, and of the entropies of their shares.
        bias_range: () highest minus lowest bias of the blocks.
    """

    balance_loss: Tensor
    z_loss: Tensor
    counts: Tensor
    dropped: Tensor
    importance: Tensor
    sent: Tensor
    scored: Tensor
    routed_mass: Tensor
    entropy: Tensor
    bias_range: Tensor

    @classmethod
    def empty(cls, num_blocks: int, like: Tensor) -> LayerRouting:
        """Return the routing of no tokens, on the device of ``like``."""
        zero = like.new_zeros((), dtype=torch.float32)
        count = like.new_zeros((), dtype=torch.int64)
        counts_B = count.new_zeros(num_blocks)
        return cls(zero, zero, counts_B, count, counts_B.float(), count, count, zero, zero, zero)


class SparseFFN(nn.Module):
    """The feed-forward network of a sparse layer.

    It takes the place of the first linear map of fairseq's layer.

    Args:
        config: sizes and choices of the memory.
        groups: the processes among which tokens count together and blocks are sharded.
    """

    def __init__(self, config: MemoryConfig, groups: ProcessGroups | None = None) -> None:
        super().__init__()
        self.memory = SparseMemory(config, groups)

    def forward(
        self,
        x: Tensor,
        token_ids: Tensor | None,
        padding_mask: Tensor | None,
        losses: bool,
        balance_scope: str = "micro",
    ) -> MemoryOutput:
        """Run the memory; see :meth:`~..memory.SparseMemory.forward`.

        Raises:
            UsageError: the engine of ``--sffn-engine`` does not support the dtype or the device, or
                the selector does not score the blocks of all ranks.
        """
        try:
            return self.memory(
                *(x, token_ids),
                padding_mask=padding_mask,
                losses=losses,
                balance_scope=balance_scope,
                sequence_dim=0,
            )
        except ConfigError as error:
            if error.field not in KNOWN_LATE:
                raise
            raise UsageError(f"{KNOWN_LATE[error.field]} {error.value}: {error.reason}") from error


class SparseLayer(nn.Module):
    """Base class to put before one of fairseq's layers: makes its feed-forward network sparse.

    Args:
        cfg: fairseq's ``TransformerConfig``.
        memory_config: sizes and choices of the memory.
        groups: the processes among which tokens count together and blocks are sharded.
    """

    fairseq_layer: ClassVar[Any]
    fc1: SparseFFN
    activation_dropout_module: nn.Module

    def __init__(
        self,
        cfg: Any,
        memory_config: MemoryConfig,
        groups: ProcessGroups | None = None,
        **kwargs: Any,
    ) -> None:
        self.memory_config, self.groups = memory_config, groups
        super().__init__(cfg, **kwargs)
        # The memory itself applies activation and dropout, between keys and values.
        self.fc1.memory.dropout = self.activation_dropout_module
        self.activation_dropout_module = nn.Identity()
        self.activation_fn = identity

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
        balance_scope: str = "micro",
        autocast: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run fairseq's layer, and pass the token ids to its memory.

        Args:
            x: (T, B, D) hidden states.
            token_ids: (T, B, context_tokens) trailing token ids.
            padding_mask: (T, B), ``True`` at padding.
            losses, balance_scope: see :meth:`~..memory.SparseMemory.forward`.
            autocast: dtype of autocast outside of the layer; ``None``: off. fairseq's activation
                checkpointing runs the layer again without autocast. The second run must use the
                same precision: otherwise, near-ties between scores would select other blocks.

        Returns:
            fairseq's outputs, then the fields of :class:`LayerRouting`.
        """
        found: MemoryOutput | None = None

        def fc1(x: Tensor) -> Tensor:
            nonlocal found
            found = self.fc1(x, token_ids, padding_mask, losses, balance_scope)
            return found.output

        again = autocast is not None and not torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, autocast) if again else nullcontext():
            outputs = self.fairseq_layer.forward(Overlay(self, fc1=fc1), x, *args, **kwargs)
        assert found is not None
        zero = x.new_zeros((), dtype=torch.float32)
        routing = LayerRouting(
            zero if found.balance_loss is None else found.balance_loss,
            zero if found.z_loss is None else found.z_loss,
            *found.usage,  # its fields are the last ones of LayerRouting
        )
        return (*(outputs if isinstance(outputs, tuple) else (outputs,)), *routing)


class SparseEncoderLayer(SparseLayer, TransformerEncoderLayerBase):
    """fairseq's encoder layer with a sparse feed-forward network."""

    fairseq_layer = TransformerEncoderLayerBase


class SparseDecoderLayer(SparseLayer, TransformerDecoderLayerBase):
    """fairseq's decoder layer with a sparse feed-forward network."""

    fairseq_layer = TransformerDecoderLayerBase


def identity(x: Tensor) -> Tensor:
    """Return x: the activation of a layer whose first map applies its own."""
    return x
