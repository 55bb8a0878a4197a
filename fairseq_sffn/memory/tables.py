"""The tables of a memory: their initialization, computation and checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .activations import GATED
from .compute import ENGINES, Tables, choose_engine
from .config import MemoryConfig
from .process_groups import ProcessGroups
from .selection import Selection
from .sharding import SHARDED, check_sharding
from .shared_blocks import SharedBlocks
from .validation import ConfigError


class MemoryTables(nn.Module):
    """The key and value tables of a memory.

    Args:
        config: sizes and choices.
        groups: the ranks that share its tokens and blocks; none by default.

    Attributes:
        keys: (C, D) key table, or ``None`` where the selector has its own keys or needs none.
        up: (C, D) second key table of gated cells, or ``None`` without ``config.glu``.
        values: (C, D) value table.
        key_bias, up_bias, value_bias: (C,), (C,) and (D,), or ``None`` without ``config.bias``.
        shared: the shared blocks, which are replicas, or ``None``. The other tables have the cells
            of the routed blocks.
        dropout: applied to the activations; any module that keeps the shape of its input.

    Where blocks are sharded, the parameters in ``SHARDED`` have the rows of this rank's blocks.
    They are marked ``expert``, fairseq's mark for parameters that are not replicas.
    """

    def __init__(self, config: MemoryConfig, groups: ProcessGroups | None = None) -> None:
        super().__init__()
        self.config, self.groups = config, groups or ProcessGroups()
        check_sharding(config, self.groups.shards)
        cells, width = config.routed_cells // self.groups.shards, config.embed_dim
        has_keys = config.selector_class.key_table == "full"
        self.keys = nn.Parameter(torch.empty(cells, width)) if has_keys else None
        self.key_bias = nn.Parameter(torch.empty(cells)) if has_keys and config.bias else None
        self.up = nn.Parameter(torch.empty(cells, width)) if config.glu else None
        self.up_bias = nn.Parameter(torch.empty(cells)) if config.glu and config.bias else None
        self.values = nn.Parameter(torch.empty(cells, width))
        self.value_bias = nn.Parameter(torch.empty(width)) if config.bias else None
        self.shared = SharedBlocks(config) if config.shared_blocks else None
        # Checkpoints store what the shapes of the tables do not tell: the block size, the scale of
        # the values, and the function of gated cells.
        self.block_size: Tensor
        self.register_buffer("block_size", torch.tensor(config.block_size))
        if config.value_lr_scale != 1:
            self.register_buffer("value_lr_scale", torch.tensor(config.value_lr_scale))
        if config.glu:
            self.register_buffer("glu", torch.tensor(GATED.index(config.glu)))
        self.dropout: nn.Module = nn.Dropout(config.activation_dropout)
        if self.groups.shards > 1:
            for name in SHARDED:
                if (parameter := getattr(self, name)) is not None:
                    parameter.expert = True

    def reset_parameters(self) -> None:
        """Initialize the tables like a dense FFN of the active size.

        See ``MemoryConfig.init_scale``. The tables do not depend on the number of shards.
        """
        by_key = self.config.init_scale * self.config.embed_dim**-0.5
        by_value = self.config.init_scale * self.config.active_cells**-0.5
        stored = by_value / self.config.value_lr_scale
        bounds = dict.fromkeys(("keys", "key_bias", "up", "up_bias"), by_key)
        bounds |= {"values": stored, "value_bias": by_value}
        for name, bound in bounds.items():
            if (parameter := getattr(self, name)) is None:
                continue
            if name not in SHARDED or self.groups.shards == 1:
                nn.init.uniform_(parameter, -bound, bound)
                continue
            cells = self.config.routed_cells
            whole = parameter.new_empty(cells, *parameter.shape[1:])
            with torch.no_grad():
                part = self.groups.part_of(cells)
                parameter.copy_(nn.init.uniform_(whole, -bound, bound)[part])
        if self.shared is not None:
            for name, parameter in self.shared.named_parameters():
                nn.init.uniform_(parameter, -bounds[name], bounds[name])

    def reset_buffers(self) -> None:
        """Set the buffers that follow from the config, after :meth:`torch.nn.Module.to_empty`."""
        self.block_size.fill_(self.config.block_size)
        if self.config.value_lr_scale != 1:
            self.get_buffer("value_lr_scale").fill_(self.config.value_lr_scale)
        if self.config.glu:
            self.get_buffer("glu").fill_(GATED.index(self.config.glu))

    def compute(self, x_ND: Tensor, selection: Selection) -> Tensor:
        """Compute the selected blocks, all held by this rank: (N, D), in the dtype of x."""
        if not self.config.routed_blocks:
            return torch.zeros_like(x_ND)
        config, dtype = self.config, x_ND.dtype
        shape = (config.routed_blocks // self.groups.shards, config.block_size, config.embed_dim)
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
            None if self.up is None else in_blocks(self.up),
            None if self.up_bias is None else in_blocks(self.up_bias),
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
        saved = state_dict.get(prefix + "glu")
        if (
            saved is not None
            and self.config.glu
            and (name := GATED[saved.item()]) != self.config.glu
        ):
            error_msgs.append(
                f"{prefix}glu is {name} in the checkpoint and {self.config.glu} in the model"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
