"""Compares a sparse memory with an fp64 copy that is made to select the same blocks.

Near ties between scores fall differently in different precisions. A selection is therefore compared
by how much its scores are below the best ones, and everything else with the same blocks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fairseq_sffn.memory import MemoryOutput, ProductScores, Scores, SparseMemory
from fairseq_sffn.memory.selectors import base_layer

FLOOR = 1e-3
"""Smallest denominator of a tensor's relative error, as a share of the largest number of all
tensors. Some gradients are zero but for rounding."""


@dataclass
class Inputs:
    """The inputs of a memory.

    Attributes:
        x_ND, token_ids_N, padding_N: as for :class:`SparseMemory`.
        cotangent_ND: gradient of the output.
        losses: whether balance and z loss are part of the loss.
    """

    x_ND: Tensor
    token_ids_N: Tensor
    padding_N: Tensor | None
    cotangent_ND: Tensor
    losses: bool = True

    def to(self, *args: Any) -> Inputs:
        """Copy to another device, and floating-point numbers to another dtype."""
        device = args[0]
        return replace(
            self,
            x_ND=self.x_ND.detach().to(*args),
            token_ids_N=self.token_ids_N.to(device),
            padding_N=None if self.padding_N is None else self.padding_N.to(device),
            cotangent_ND=self.cotangent_ND.to(*args),
        )


def forward_backward(
    memory: SparseMemory, inputs: Inputs, autocast: torch.dtype | None = None
) -> tuple[MemoryOutput, dict[str, Tensor]]:
    """Return the memory's result, and its output, losses and all gradients by name."""
    x_ND = inputs.x_ND.clone().requires_grad_()
    device = x_ND.device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        out = memory(x_ND, inputs.token_ids_N, padding_mask=inputs.padding_N, losses=inputs.losses)
    wide = torch.promote_types(out.output.dtype, torch.float32)
    loss = (out.output.to(wide) * inputs.cotangent_ND.to(wide)).sum()
    values = {"output": out.output.detach()}
    if inputs.losses and out.balance_loss is not None:
        assert out.z_loss is not None
        loss = loss + out.balance_loss + out.z_loss
        values |= {"balance_loss": out.balance_loss.detach(), "z_loss": out.z_loss.detach()}
    loss.backward()
    values["gradient of x"] = _gradient(x_ND)
    for name, parameter in memory.named_parameters():
        values[f"gradient of {name}"] = _gradient(parameter)
        parameter.grad = None
    return out, values


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def twin_of(memory: SparseMemory, device: str, engine: str) -> SparseMemory:
    """Copy a memory in fp64, with the given engine."""
    twin = copy.deepcopy(memory).to(device, torch.float64)
    twin.config = replace(memory.config, engine=engine)
    return twin


@contextlib.contextmanager
def forced(blocks_NA: Tensor) -> Iterator[list[float]]:
    """Make every selector that scores blocks select the given blocks.

    Yields:
        A list to which each selection appends the largest amount by which a token's scores are
        below the best ones.
    """
    losses: list[float] = []
    rest_nA = blocks_NA
    plain = {kind: kind.top for kind in (Scores, ProductScores)}

    def compare(scores: Scores, best_NA: Tensor, ours_NA: Tensor) -> None:
        best_NA, ours_NA = scores.of(best_NA).detach(), scores.of(ours_NA).detach()
        lost_N = (best_NA - ours_NA).sum(dim=1) / best_NA.abs().sum(dim=1).clamp(min=1e-30)
        losses.append(lost_N.max().item() if len(lost_N) else 0.0)

    def top(self: Scores, active_blocks: int, *bias: Any) -> Tensor:
        # Without losses some selectors score a few tokens at a time.
        nonlocal rest_nA
        ours_nA, rest_nA = rest_nA.tensor_split([self.num_tokens])
        compare(self, plain[type(self)](self, active_blocks, *bias), ours_nA)
        return ours_nA

    with (
        mock.patch.object(Scores, "top", top),
        mock.patch.object(ProductScores, "top", top),
        mock.patch.object(base_layer, "balanced_assignment", lambda *_, **__: blocks_NA.squeeze(1)),
    ):
        yield losses


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Return, for each tensor, the largest difference relative to the largest number. It is
    infinite where shapes differ or numbers are not finite."""
    largest = max((t.abs().max().item() for t in want.values() if t.numel()), default=0.0)
    result = {}
    for name, ours in got.items():
        theirs = want[name]
        if ours.shape != theirs.shape or not ours.isfinite().all():
            result[name] = float("inf")
        elif ours.numel():
            difference = (ours.to(theirs.device, torch.float64) - theirs).abs().max().item()
            scale = max(theirs.abs().max().item(), FLOOR * largest)
            result[name] = difference / max(scale, 1e-30)
    return result
