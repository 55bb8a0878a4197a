"""Checks of a memory's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MemoryConfig


def flatten_inputs(
    config: MemoryConfig, x: Tensor, token_ids: Tensor | None, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check the inputs of a memory, and flatten them to N tokens.

    Args:
        config: the memory's sizes.
        x, token_ids, padding_mask: see :meth:`.sparse_memory.SparseMemory.forward`.

    Returns:
        x (N, D); the trailing token ids (N, context_tokens), or ``None`` if the selector does not
        read token ids; and the positions that are not padding (N,) bool, or ``None`` without a
        mask.

    Raises:
        ValueError: a shape or dtype does not fit, or token ids are missing.
    """
    if x.shape[-1:] != (config.embed_dim,):
        raise ValueError(f"x of shape {tuple(x.shape)} is not (..., {config.embed_dim})")
    valid_N = None
    if padding_mask is not None:
        shape, wanted = tuple(padding_mask.shape), tuple(x.shape[:-1])
        if shape != wanted or padding_mask.dtype != torch.bool:
            raise ValueError(
                f"padding_mask of shape {shape} and {padding_mask.dtype} does not fit: "
                f"expected {wanted} and torch.bool"
            )
        valid_N = ~padding_mask.reshape(-1)
    return x.reshape(-1, config.embed_dim), _flatten_token_ids(config, x, token_ids), valid_N


def by_sequence(values_N: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Give the tokens of a flattened input by sequence: (N, ...) -> (S, T, ...).

    Args:
        values_N: values of the tokens.
        shape: the shape of x before it was flattened, (..., D).
        dim: the dimension of x along which a sequence runs.
    """
    dim = dim % len(shape)
    leading = len(shape) - 1
    values = values_N.unflatten(0, shape[:-1]).movedim(dim, leading - 1)
    return values.unsqueeze(0) if leading == 1 else values.flatten(0, leading - 2)


def _flatten_token_ids(config: MemoryConfig, x: Tensor, token_ids: Tensor | None) -> Tensor | None:
    context = config.context_tokens
    if token_ids is None:
        if not context:
            return None
        raise ValueError(f"{config.selector_class.name} selects by token ids: give them")
    # Checked even if the selector does not read token ids.
    given, wanted = tuple(token_ids.shape), (*x.shape[:-1], max(context, 1))
    if given == wanted[:-1]:
        token_ids = token_ids.unsqueeze(-1)
    if token_ids.shape[:-1] != x.shape[:-1] or token_ids.shape[-1] < context:
        raise ValueError(f"token_ids of shape {given} do not fit: expected {wanted}")
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise ValueError(f"token_ids of {token_ids.dtype} are no whole numbers")
    return token_ids[..., -context:].reshape(-1, context) if context else None
