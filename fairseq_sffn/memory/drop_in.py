"""A memory in the place of a dense FFN, in models whose code stays as it is.

    for block in model.transformer.h:
        block.mlp = MemoryFFN(SparseMemory(config))

A model that calls a :class:`.sparse_memory.SparseMemory` itself needs none of this: it passes token
ids and padding, and adds ``balance_loss`` to its loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .sparse_memory import SparseMemory
from .validation import ConfigError


class MemoryFFN(nn.Module):
    """A memory with the interface of an FFN: hidden states in, hidden states out.

    In training, the weighted balance loss and z loss join the backward pass at the output: its
    gradients are those of ``loss + balance_weight * balance_loss + z_weight * z_loss``, and the
    model need not carry the losses to the end. The value of the model's own loss does not change.
    This works with activation checkpointing of both kinds.

    The gradients of these losses do not follow a factor of the model's loss. With gradient
    accumulation over n micro-batches, set ``balance_weight`` to the n-th part. With a
    ``GradScaler``, set it to the weight times the current scale.

    Args:
        memory: computes the output.
        balance_weight: weight of the balance loss; ``None`` takes the selector's default.
        z_weight: weight of the z loss.
        balance_scope: see :meth:`.sparse_memory.SparseMemory.forward`.

    Attributes:
        token_ids: (..., ) ids of the next call, or ``None``; set by :func:`feed_tokens`.
        padding_mask: (..., ) bool, ``True`` at padding, or ``None``; the same.

    Raises:
        ConfigError: a weight is negative or infinite, or no such loss can change the selection.
    """

    def __init__(
        self,
        memory: SparseMemory,
        balance_weight: float | None = None,
        z_weight: float = 0.0,
        balance_scope: str = "micro",
    ) -> None:
        super().__init__()
        selector = memory.config.selector_class
        if balance_weight is None:
            balance_weight = selector.default_balance_weight
        for name, weight, acts in (
            ("balance_weight", balance_weight, selector.selects_by_scores),
            ("z_weight", z_weight, True),
        ):
            if not 0 <= weight < math.inf:
                raise ConfigError(name, weight, "must not be negative, infinite or NaN")
            if weight and not (selector.scores_blocks and acts):
                raise ConfigError(
                    name, weight, f"{selector.name} selects by no score that it acts on"
                )
        self.memory = memory
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.balance_scope = balance_scope
        self.token_ids: Tensor | None = None
        self.padding_mask: Tensor | None = None

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Look up every token.

        Args:
            x: (..., D) hidden states.
            token_ids: see :meth:`.sparse_memory.SparseMemory.forward`; by default those of
                :func:`feed_tokens`.
            padding_mask: the same. A mask of more positions than x has is that of a sequence whose
                last positions x has, as in incremental decoding.

        Returns:
            (..., D).
        """
        token_ids = self.token_ids if token_ids is None else token_ids
        padding_mask = self.padding_mask if padding_mask is None else padding_mask
        if padding_mask is not None and x.dim() > 1:
            padding_mask = padding_mask[..., -x.shape[-2] :].to(x.device)
        weighted = self.balance_weight > 0 or self.z_weight > 0
        out = self.memory(
            x,
            None if token_ids is None else token_ids.to(x.device),
            padding_mask=padding_mask,
            losses=weighted and self.training and torch.is_grad_enabled(),
            balance_scope=self.balance_scope,
        )
        output: Tensor = out.output
        if out.balance_loss is not None and self.balance_weight:
            output = _AddedLoss.apply(output, self.balance_weight * out.balance_loss)
        if out.z_loss is not None and self.z_weight:
            output = _AddedLoss.apply(output, self.z_weight * out.z_loss)
        return output

    def extra_repr(self) -> str:
        return f"balance_weight={self.balance_weight:g}, z_weight={self.z_weight:g}"


class _AddedLoss(torch.autograd.Function):
    """Returns its first argument. In the backward pass, the second has the gradient 1."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def memories(model: nn.Module) -> Iterator[SparseMemory]:
    """Yield the memories of a model, each once."""
    for module in model.modules():
        if isinstance(module, SparseMemory):
            yield module


def end_update(model: nn.Module) -> None:
    """Call :meth:`.sparse_memory.SparseMemory.end_update` of each memory of a model.

    An optimizer can do it after each of its steps::

        optimizer.register_step_post_hook(lambda *_: end_update(model))
    """
    for memory in memories(model):
        memory.end_update()


def begin_update(model: nn.Module) -> None:
    """Call :meth:`.sparse_memory.SparseMemory.begin_update` of each memory of a model.

    It is for a step that was skipped.
    """
    for memory in memories(model):
        memory.begin_update()


def feed_tokens(
    model: nn.Module, ids: str = "input_ids", mask: str = "attention_mask"
) -> RemovableHandle:
    """Give the memories in a model its token ids and its padding, at each call of the model.

    A hook reads them from the arguments of the model's ``forward``, and leaves them at each
    :class:`MemoryFFN` until the next call. With activation checkpointing, the backward pass reads
    them again: it must come before the next call.

    Args:
        model: contains at least one :class:`MemoryFFN`. Its parts are not called without it.
        ids: name of the argument with (B, T) token ids.
        mask: name of the argument with the padding: (B, S), 0 at padding, where the last T of S
            positions are those of the ids. A mask of another form, or none, means no padding.

    Returns:
        The handle that removes the hook.

    Raises:
        ConfigError: a memory reads more than the current token id, which a model that decodes step
            by step does not get.
        ValueError: the model has no :class:`MemoryFFN`, or no such argument.
    """
    found = [module for module in model.modules() if isinstance(module, MemoryFFN)]
    if not found:
        raise ValueError("the model has no MemoryFFN")
    for module in found:
        config = module.memory.config
        if config.context_tokens > 1:
            reason = f"reads {config.context_tokens} token ids at each position; pass them yourself"
            raise ConfigError("selector", config.selector_class.name, reason)
    names = list(inspect.signature(model.forward).parameters)
    if ids not in names:
        raise ValueError(f"{ids} is no argument of the model's forward: {', '.join(names)}")
    positions = {name: names.index(name) for name in (ids, mask) if name in names}
    return model.register_forward_pre_hook(_TokenFeed(positions, ids, mask), with_kwargs=True)


class _TokenFeed:
    """The hook of :func:`feed_tokens`. It has no reference to the model, so that copies work.

    Args:
        positions: position of each argument of the model.
        ids, mask: names of the two arguments.
    """

    def __init__(self, positions: dict[str, int], ids: str, mask: str) -> None:
        self.positions, self.ids, self.mask = positions, ids, mask

    def __call__(
        self, model: nn.Module, arguments: tuple[Any, ...], by_name: dict[str, Any]
    ) -> None:
        token_ids, mask = (
            self._argument(name, arguments, by_name) for name in (self.ids, self.mask)
        )
        has_mask = isinstance(mask, Tensor) and mask.dim() == 2
        for module in model.modules():
            if isinstance(module, MemoryFFN):
                module.token_ids = token_ids
                module.padding_mask = mask == 0 if has_mask else None

    def _argument(self, name: str, arguments: tuple[Any, ...], by_name: dict[str, Any]) -> Any:
        position = self.positions.get(name, len(arguments))
        return by_name.get(name, arguments[position] if position < len(arguments) else None)
