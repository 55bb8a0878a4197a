"""The sparse neural memory: select -> compute -> combine."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .balance import assignment_counts, balance_loss, z_loss
from .capacity import keep_within_capacity
from .compute import ENGINES, Tables, choose_engine
from .config import ConfigError, MemoryConfig
from .exchange import ProcessGroups, compute_shared
from .gate import GATES
from .selection import Selection, Selector, SelectorInput
from .usage import Usage

SHARDED = ("keys", "key_bias", "values")
"""The parameters of which each rank holds its blocks' part, where blocks are shared out."""


class MemoryOutput(NamedTuple):
    """What one pass through a memory gives.

    Attributes:
        output: (..., D), the shape of x.
        selection: blocks and weights of the N tokens, in the order of x flattened.
        balance_loss: () 1.0 at perfect balance; ``None`` if the selector scores no blocks, or it
            was not asked for.
        z_loss: () mean squared log-partition of the scores; ``None`` likewise.
        usage: assignments per block and dropped ones, padding excluded.
    """

    output: Tensor
    selection: Selection
    balance_loss: Tensor | None
    z_loss: Tensor | None
    usage: Usage


class SparseMemory(nn.Module):
    """y = sum over selected blocks i of w_i * f(x K_i^T + c_i) V_i + output bias.

    Liu et al. 2023 (arXiv 2305.13999). With every block active and no gate it is a
    dense FFN of ``num_cells`` hidden units.

    Args:
        config: sizes and choices.
        groups: with which other processes its tokens and blocks are shared; by default with none.

    Attributes:
        keys: (C, D) key table, or ``None`` where the selector has its own keys or needs none.
        values: (C, D) value table.
        key_bias, value_bias: (C,) and (D,), or ``None`` without ``config.bias``.
            Of keys, values and key bias this rank has its part only where blocks are shared out;
            those parameters are marked ``expert``, as fairseq marks what is no replica.
        selector: the module that chooses blocks.
        dropout: applied to the activations; any module that keeps the shape of its input.
    """

    def __init__(self, config: MemoryConfig, groups: ProcessGroups | None = None) -> None:
        super().__init__()
        self.config, self.groups = config, groups or ProcessGroups()
        check_sharding(config, self.groups.shards)
        cells, width = config.num_cells // self.groups.shards, config.embed_dim
        has_keys = config.selector_class.key_table == "full"
        self.keys = nn.Parameter(torch.empty(cells, width)) if has_keys else None
        self.key_bias = nn.Parameter(torch.empty(cells)) if has_keys and config.bias else None
        self.values = nn.Parameter(torch.empty(cells, width))
        self.value_bias = nn.Parameter(torch.empty(width)) if config.bias else None
        self.selector = config.selector_class(config)
        # Stored, since a table does not tell into which blocks it is divided.
        self.block_size: Tensor
        self.register_buffer("block_size", torch.tensor(config.block_size))
        # As is the scale of the values, where they have one.
        if config.value_lr_scale != 1:
            self.register_buffer("value_lr_scale", torch.tensor(config.value_lr_scale))
        self.dropout: nn.Module = nn.Dropout(config.activation_dropout)
        if self.groups.shards > 1:
            for name in SHARDED:
                if (parameter := getattr(self, name)) is not None:
                    parameter.expert = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables as a dense FFN of the active size draws its weights (see
        ``MemoryConfig.init_scale``); whoever shares them, the same tables."""
        by_key = self.config.init_scale * self.config.embed_dim**-0.5
        by_value = self.config.init_scale * self.config.active_cells**-0.5
        stored = by_value / self.config.value_lr_scale
        bounds = {"keys": by_key, "key_bias": by_key, "values": stored, "value_bias": by_value}
        for name, bound in bounds.items():
            if (parameter := getattr(self, name)) is None:
                continue
            if name not in SHARDED or self.groups.shards == 1:
                nn.init.uniform_(parameter, -bound, bound)
                continue
            whole = parameter.new_empty(self.config.num_cells, *parameter.shape[1:])
            with torch.no_grad():
                part = self.groups.part_of(self.config.num_cells)
                parameter.copy_(nn.init.uniform_(whole, -bound, bound)[part])

    def forward(
        self,
        x: Tensor,
        token_ids: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        losses: bool = True,
    ) -> MemoryOutput:
        """Look up every token.

        Args:
            x: (..., D) hidden states.
            token_ids: (..., context_tokens), the trailing token ids of each position, the current
                one last, or (...,) the current ones; needed by selectors that look at token ids.
            padding_mask: (...,) bool, ``True`` at padding, which is computed but counts neither
                in the losses nor in the usage, and takes no capacity.
            losses: whether balance and z loss are wanted. Without them a selector may leave out
                the scores of all blocks.

        Raises:
            ValueError: a shape does not fit, token ids are missing or out of range, or the forced
                engine cannot multiply these tables.
        """
        if x.shape[-1:] != (self.config.embed_dim,):
            raise ValueError(f"x of shape {tuple(x.shape)} is not (..., {self.config.embed_dim})")
        if padding_mask is not None:
            shape, wanted = tuple(padding_mask.shape), tuple(x.shape[:-1])
            if shape != wanted or padding_mask.dtype != torch.bool:
                raise ValueError(
                    f"padding_mask of shape {shape} and {padding_mask.dtype} does not fit: "
                    f"expected {wanted} and torch.bool"
                )
        x_ND = x.reshape(-1, self.config.embed_dim)
        valid_N = None if padding_mask is None else ~padding_mask.reshape(-1)
        token_ids_NT = self._flatten_token_ids(token_ids, x)
        gate = GATES[self.config.gate_name]
        needs_scores = losses or gate is not None
        inputs = SelectorInput(x_ND, self.keys, self.key_bias, token_ids_NT, valid_N, needs_scores)
        if self.groups != ProcessGroups():
            inputs = inputs._replace(
                gather=self.groups.gather,
                gather_tokens=self.groups.gather_tokens,
                stack_over_tokens=self.groups.stack_over_tokens,
            )
        selection = self.selector(inputs)
        if gate is not None:
            selection = selection._replace(weights=gate(selection.scores, selection.blocks))

        selection, balance_counts_B, usage = self._count(selection, valid_N)
        balance = z = None
        if losses and selection.scores is not None:
            total = None if self.groups.tokens is None else self.groups.sum_over_tokens
            balance = balance_loss(selection.scores, balance_counts_B, valid_N, total)
            z = z_loss(selection.scores, valid_N, total)
        output_ND, sent = self._compute(x_ND, selection)
        if self.groups.blocks is not None:
            usage = usage._replace(sent=usage.counts.new_full((), sent))
        return MemoryOutput(output_ND.view(x.shape), selection, balance, z, usage)

    def _count(
        self, selection: Selection, valid_N: Tensor | None
    ) -> tuple[Selection, Tensor, Usage]:
        """Count what goes where and drop what does not fit: the selection that is left, the counts
        for the balance loss, and the usage."""
        blocks_NA, num_blocks = selection.blocks, self.config.num_blocks
        counted = None if valid_N is None else valid_N.unsqueeze(1)
        if selection.kept is not None:
            counted = selection.kept if counted is None else selection.kept & counted
        counts_B = balance_counts_B = assignment_counts(blocks_NA, num_blocks, counted)
        if (choices := self.config.selector_class.balanced_choices) is not None:
            first = None if counted is None else counted[:, :choices]
            balance_counts_B = assignment_counts(blocks_NA[:, :choices], num_blocks, first)

        importance_B = counts_B.float()
        factors = [t for t in (selection.weights, selection.coefficients) if t is not None]
        if factors:
            importance_NA = torch.stack(factors).detach().float().prod(dim=0).abs()
            importance_NA = importance_NA if counted is None else importance_NA * counted
            importance_B = importance_B.zero_().scatter_add_(
                0, blocks_NA.flatten(), importance_NA.flatten()
            )

        zero = dropped = counts_B.new_zeros(())
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor:
            fits_NA = keep_within_capacity(blocks_NA, num_blocks, factor, counted)
            dropped = (~fits_NA).sum()
            if selection.kept is not None:
                fits_NA = fits_NA & selection.kept
            selection = selection._replace(kept=fits_NA)
        return selection, balance_counts_B, Usage(counts_B, dropped, importance_B, zero)

    def _flatten_token_ids(self, token_ids: Tensor | None, x: Tensor) -> Tensor | None:
        context = self.config.context_tokens
        if token_ids is None:
            if not context:
                return None
            raise ValueError(f"{self.config.selector_class.name} selects by token ids: give them")
        # What a selector does not look at has to fit all the same.
        given, wanted = tuple(token_ids.shape), (*x.shape[:-1], max(context, 1))
        if given == wanted[:-1]:
            token_ids = token_ids.unsqueeze(-1)
        if token_ids.shape[:-1] != x.shape[:-1] or token_ids.shape[-1] < context:
            raise ValueError(f"token_ids of shape {given} do not fit: expected {wanted}")
        if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
            raise ValueError(f"token_ids of {token_ids.dtype} are no whole numbers")
        return token_ids[..., -context:].reshape(-1, context) if context else None

    def _compute(self, x_ND: Tensor, selection: Selection) -> tuple[Tensor, int]:
        """The output of the selected blocks, and the bytes sent to other ranks for it."""
        config, device = self.config, x_ND.device
        # Under autocast the tables are cast here, as inside any autocast matrix product.
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.values.dtype
        x_ND, sent = x_ND.to(dtype), 0
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            if self.groups.blocks is None:
                output_ND = self._compute_own(x_ND, selection)
            else:
                blocks = config.num_blocks // self.groups.shards
                output_ND, traffic = compute_shared(
                    x_ND, selection, blocks, self.groups.blocks, self._compute_own
                )
                sent = traffic.forward + traffic.indices
                if self.training and not torch.is_grad_enabled():
                    sent *= 2  # activation checkpointing, which runs a second time with gradients
                sent += self.training * traffic.backward
            if config.value_lr_scale != 1:
                output_ND = output_ND * config.value_lr_scale
            if self.value_bias is not None:
                output_ND = output_ND + self.value_bias.to(dtype)
        return output_ND, sent

    def _compute_own(self, x_ND: Tensor, selection: Selection) -> Tensor:
        """The output of blocks that this rank holds; its dtype is that of ``x_ND``."""
        config, dtype = self.config, x_ND.dtype
        shape = (config.num_blocks // self.groups.shards, config.block_size, config.embed_dim)
        if config.engine is None:
            num_tokens, active = selection.blocks.shape
            engine = choose_engine(x_ND.device.type, dtype, num_tokens, active, shape)
        else:
            engine = ENGINES[config.engine]
            if not engine.supports(x_ND.device.type, dtype, shape):
                reason = "cannot multiply {} {} blocks of {} x {} on this device"
                reason = reason.format(shape[0], dtype, *shape[1:])
                raise ConfigError("engine", config.engine, reason)

        def in_blocks(table: Tensor) -> Tensor:
            return table.to(dtype).unflatten(0, shape[:2])

        tables = Tables(
            None if self.keys is None else in_blocks(self.keys),
            None if self.key_bias is None else in_blocks(self.key_bias),
            in_blocks(self.values),
        )
        return engine.compute(x_ND, tables, selection, config.activation_fn, self.dropout)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        error_msgs: list[str] = args[-1]
        for name in ("block_size", "value_lr_scale"):
            saved, own = state_dict.get(prefix + name), getattr(self.config, name)
            if saved is not None and not math.isclose(saved.item(), own, rel_tol=1e-2):
                error_msgs.append(
                    f"{prefix}{name} is {saved.item():g} in the checkpoint and {own:g} in the model"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"cells={config.num_cells}, blocks={config.num_blocks} x {config.block_size}, "
            f"active={config.active_blocks}, selector={config.selector_class.name}, "
            f"gate={config.gate_name}"
        )


def can_be_shared_out(selector: type[Selector]) -> bool:
    """Whether the blocks of a method can be on different ranks."""
    return selector.key_table == "full" and not selector.scores_every_key


def check_sharding(config: MemoryConfig, shards: int) -> None:
    """Raises ConfigError, field ``shards``, where the blocks cannot be shared out so."""
    selector = config.selector_class
    if shards < 1:
        raise ConfigError("shards", shards, "must be at least 1")
    if shards == 1:
        return
    if selector.scores_every_key:
        reason = f"{selector.name} scores every key for every token, and no rank has all of them"
    elif not can_be_shared_out(selector):
        reason = f"{selector.name} has keys of its own, which every token needs whole"
    elif config.num_blocks % shards:
        reason = f"does not divide the {config.num_blocks} blocks of a layer"
    else:
        return
    raise ConfigError("shards", shards, reason)
