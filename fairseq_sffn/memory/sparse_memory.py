"""The sparse neural memory: select -> compute -> combine."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .balance import assignment_counts, balance_loss, z_loss
from .capacity import drop_over_capacity
from .compute import ENGINES, Tables, choose_engine
from .config import ConfigError, MemoryConfig
from .dispatch import combine, dispatch
from .gate import GATES
from .inputs import flatten_inputs
from .process_groups import ProcessGroups
from .selection import Selection, Selector, SelectorInput
from .usage import Usage, block_importance

SHARDED = ("keys", "key_bias", "values")
"""Parameters of which each rank holds the rows of its own blocks, where blocks are sharded."""


class MemoryOutput(NamedTuple):
    """The result of one pass through a memory.

    Attributes:
        output: (..., D), the shape of x.
        selection: blocks and weights of the N tokens, in the order of the flattened x.
        balance_loss: () 1.0 at perfect balance; ``None`` if the selector scores no blocks or the
            losses were not requested.
        z_loss: () mean squared log-partition of the scores, or ``None`` as above.
        usage: assignments per block, and dropped ones, padding excluded.
    """

    output: Tensor
    selection: Selection
    balance_loss: Tensor | None
    z_loss: Tensor | None
    usage: Usage


class SparseMemory(nn.Module):
    """y = sum over selected blocks i of w_i * f(x K_i^T + c_i) V_i + output bias.

    Liu et al. 2023 (arXiv 2305.13999). With all blocks active and no gate it is a dense FFN of
    ``num_cells`` hidden units.

    Args:
        config: sizes and choices.
        groups: the ranks that share its tokens and blocks; none by default.

    Attributes:
        keys: (C, D) key table, or ``None`` where the selector has its own keys or needs none.
        values: (C, D) value table.
        key_bias, value_bias: (C,) and (D,), or ``None`` without ``config.bias``.
        selector: the module that selects blocks.
        dropout: applied to the activations; any module that keeps the shape of its input.

    Where blocks are sharded, keys, values and key bias have the rows of this rank's blocks. These
    parameters are marked ``expert``, fairseq's mark for parameters that are not replicas.
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
        # Checkpoints store what the shapes of the tables do not tell: the block size, and the scale
        # of the values.
        self.block_size: Tensor
        self.register_buffer("block_size", torch.tensor(config.block_size))
        if config.value_lr_scale != 1:
            self.register_buffer("value_lr_scale", torch.tensor(config.value_lr_scale))
        self.dropout: nn.Module = nn.Dropout(config.activation_dropout)
        if self.groups.shards > 1:
            for name in SHARDED:
                if (parameter := getattr(self, name)) is not None:
                    parameter.expert = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the tables like a dense FFN of the active size.

        See ``MemoryConfig.init_scale``. The tables do not depend on the number of shards.
        """
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
            token_ids: (..., T) trailing token ids of each position, the current one last, or (...,)
                current ids; T is at least ``config.context_tokens``. Required by selectors that
                read token ids.
            padding_mask: (...,) bool, ``True`` at padding. Padding is computed, but excluded from
                losses, usage and capacity.
            losses: whether to compute balance and z loss. Without them a selector may skip the
                scores of all blocks.

        Raises:
            ValueError: a shape does not fit, token ids are missing or out of range, the forced
                engine does not support these tables, or the selector does not score all blocks.
        """
        x_ND, token_ids_NT, valid_N = flatten_inputs(self.config, x, token_ids, padding_mask)

        # Select: the blocks of each token and their weights.
        selection = self._select(x_ND, token_ids_NT, valid_N, losses)
        counted = selection.counted(valid_N)
        counts_B = assignment_counts(selection.blocks, self.config.num_blocks, counted)
        balance = z = None
        if losses and selection.scores is not None:
            balance, z = self._losses(selection, counts_B, counted, valid_N)
        importance_B = block_importance(selection, counts_B, counted)
        sent = dropped = counts_B.new_zeros(())
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor:
            num_blocks = self.config.num_blocks
            selection, dropped = drop_over_capacity(selection, num_blocks, factor, counted)

        # Compute: the selected blocks, on the ranks that hold them. Under autocast the tables are
        # cast here, as in any matrix product under autocast.
        device = x.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.values.dtype
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            x_ND = x_ND.to(dtype)
            if self.groups.blocks is None:
                output_ND = self._compute(x_ND, selection)
            else:
                blocks = self.config.num_blocks // self.groups.shards
                dispatched = dispatch(x_ND, selection, blocks, self.groups.blocks)
                computed_RD = self._compute(dispatched.x_RD, dispatched.selection)
                output_ND = combine(computed_RD, dispatched)
                sent = sent.new_full((), dispatched.traffic.sent_bytes(self.training))

            # Combine: the sum over blocks, scaled, plus the bias.
            if self.config.value_lr_scale != 1:
                output_ND = output_ND * self.config.value_lr_scale
            if self.value_bias is not None:
                output_ND = output_ND + self.value_bias.to(dtype)
        usage = Usage(counts_B, dropped, importance_B, sent)
        return MemoryOutput(output_ND.view(x.shape), selection, balance, z, usage)

    def _select(
        self, x_ND: Tensor, token_ids_NT: Tensor | None, valid_N: Tensor | None, losses: bool
    ) -> Selection:
        """Select the blocks of each token, and compute their gate values."""
        gate = GATES[self.config.gate_name]
        needs_scores = losses or gate is not None
        inputs = SelectorInput(x_ND, self.keys, self.key_bias, token_ids_NT, valid_N, needs_scores)
        if self.groups != ProcessGroups():
            inputs = inputs._replace(
                gather=self.groups.gather,
                gather_tokens=self.groups.gather_tokens,
                stack_over_tokens=self.groups.stack_over_tokens,
            )
        selection: Selection = self.selector(inputs)
        if selection.scores is not None and selection.scores.num_blocks != self.config.num_blocks:
            raise ConfigError(
                *("shards", self.groups.shards),
                f"{self.config.selector_class.name} scores {selection.scores.num_blocks} of "
                f"{self.config.num_blocks} blocks: a rank has the keys of its own blocks, so the "
                "selector has to gather what it computes of them (SelectorInput.gather)",
            )
        if gate is not None:
            assert selection.scores is not None
            selection = selection._replace(weights=gate(selection.scores, selection.blocks))
        return selection

    def _losses(
        self,
        selection: Selection,
        counts_B: Tensor,
        counted: Tensor | None,
        valid_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute balance loss and z loss, over the ranks that share tokens."""
        assert selection.scores is not None
        if (choices := self.config.selector_class.balanced_choices) is not None:
            counted = None if counted is None else counted[:, :choices]
            blocks_NA = selection.blocks[:, :choices]
            counts_B = assignment_counts(blocks_NA, self.config.num_blocks, counted)
        total = None if self.groups.tokens is None else self.groups.sum_over_tokens
        balance = balance_loss(selection.scores, counts_B, valid_N, total)
        return balance, z_loss(selection.scores, valid_N, total)

    def _compute(self, x_ND: Tensor, selection: Selection) -> Tensor:
        """Compute the selected blocks, all held by this rank: (N, D), in the dtype of x."""
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


def can_be_sharded(selector: type[Selector]) -> bool:
    """Return whether different ranks can hold different blocks of this method."""
    return selector.key_table == "full" and not selector.scores_every_key


def check_sharding(config: MemoryConfig, shards: int) -> None:
    """Check that the blocks can be divided over this number of ranks.

    Raises:
        ConfigError: the field ``shards``, and why not.
    """
    selector = config.selector_class
    if shards < 1:
        raise ConfigError("shards", shards, "must be at least 1")
    if shards == 1:
        return
    if selector.scores_every_key:
        reason = f"{selector.name} scores every key for every token, and no rank has all of them"
    elif not can_be_sharded(selector):
        reason = f"{selector.name} has keys of its own, which every token needs whole"
    elif config.num_blocks % shards:
        reason = f"does not divide the {config.num_blocks} blocks of a layer"
    else:
        return
    raise ConfigError("shards", shards, reason)
