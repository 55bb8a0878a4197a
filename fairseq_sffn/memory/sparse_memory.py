"""The sparse neural memory: select -> compute -> combine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .balance import (
    assignment_counts,
    balance_loss,
    entropy_loss,
    sequence_balance_loss,
    z_loss,
)
from .balancer import Balancer
from .capacity import drop_over_capacity
from .config import MemoryConfig
from .dispatch import combine, dispatch
from .gate import GATES, score_function
from .inputs import by_sequence, flatten_inputs
from .process_groups import ProcessGroups
from .scores import Split
from .selection import Selection, SelectorInput
from .tables import MemoryTables
from .usage import Usage, block_importance, score_statistics
from .validation import check_selection, check_selector


class MemoryOutput(NamedTuple):
    """The result of one pass through a memory.

    Attributes:
        output: (..., D), the shape of x.
        selection: blocks and weights of the N tokens, in the order of the flattened x.
        balance_loss: () of the selector's kind (``Selector.balance_loss_kind``): 1.0 at perfect
            balance by default; ``None`` if the selector scores no blocks or the losses were not
            requested.
        z_loss: () mean squared log-partition of the scores, or ``None`` as above.
        usage: assignments per block, and dropped ones, padding excluded.
    """

    output: Tensor
    selection: Selection
    balance_loss: Tensor | None
    z_loss: Tensor | None
    usage: Usage


class SparseMemory(MemoryTables):
    """y = sum over selected blocks i of w_i * f(x K_i^T + c_i) V_i + output bias.

    Liu et al. 2023 (arXiv 2305.13999). With all blocks active and no gate it is a dense FFN of
    ``num_cells`` hidden units. Gated cells and shared blocks: see :class:`.config.MemoryConfig`.

    Args:
        config: sizes and choices.
        groups: the ranks that share its tokens and blocks; none by default.

    Raises:
        ConfigError: ``num_params`` of the selector is not the number of its parameters.

    Attributes:
        selector: the module that selects blocks among those that are not shared.
        balancer: the biases that balance the load, and the load of an update.
        keys, key_bias, up, up_bias, values, value_bias, shared, dropout: see
            :class:`.tables.MemoryTables`.
    """

    def __init__(self, config: MemoryConfig, groups: ProcessGroups | None = None) -> None:
        super().__init__(config, groups)
        self.selector: nn.Module = nn.Identity()  # if all blocks are shared
        if config.routed_blocks:
            self.selector = config.selector_class(config.routed)
            check_selector(config, self.selector)
        function = score_function(config.gate_name)
        rate = config.balance_rate if config.routed_blocks else 0.0
        self.balancer = Balancer(config.routed_blocks, rate, function)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        token_ids: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        losses: bool = True,
        balance_scope: str = "micro",
        sequence_dim: int = -2,
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
            balance_scope: the tokens of one balance loss: those of the micro-batch (``micro``), of
                each sequence (``sequence``), or, for the assignments, those of the micro-batches
                of the optimizer update so far (``global``; see :meth:`end_update`).
            sequence_dim: the dimension of x along which a sequence runs; read by scope
                ``sequence``.

        Raises:
            ValueError: a shape does not fit, token ids are missing or out of range, the forced
                engine does not support these tables, or the selector returns blocks that are not
                int64, no scores although they are needed, or scores of some blocks only.
        """
        x_ND, token_ids_NT, valid_N = flatten_inputs(self.config, x, token_ids, padding_mask)

        # Select: the blocks of each token and their weights.
        selection = self._select(x_ND, token_ids_NT, valid_N, losses)
        counted = selection.counted(valid_N)
        num_blocks = self.config.routed_blocks
        counts_B = assignment_counts(selection.blocks, num_blocks, counted)
        balance = z = None
        sent = dropped = scored = counts_B.new_zeros(())
        mass = entropy = bias_range = torch.zeros((), device=x.device)
        if losses and selection.scores is not None:

            def split(values_N: Tensor) -> Tensor:
                return by_sequence(values_N, x.shape, sequence_dim)

            balance, z = self._losses(selection, counts_B, counted, valid_N, balance_scope, split)
            function = self.balancer.function
            scored, mass, entropy = score_statistics(selection, function, valid_N)
        # With activation checkpointing only the second pass has gradients: it alone counts.
        if self.training and torch.is_grad_enabled():
            self.balancer.count(counts_B, selection.scores, valid_N)
        if self.balancer.bias is not None:
            bias_range = self.balancer.bias.max() - self.balancer.bias.min()
        importance_B = block_importance(selection, counts_B, counted)
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor:
            selection, dropped = drop_over_capacity(selection, num_blocks, factor, counted)

        # Compute: the selected blocks, on the ranks that hold them. Under autocast the tables are
        # cast here, as in any matrix product under autocast.
        device = x.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.values.dtype
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            x_ND = x_ND.to(dtype)
            if self.groups.blocks is None:
                output_ND = self.compute(x_ND, selection)
            else:
                blocks = num_blocks // self.groups.shards
                dispatched = dispatch(x_ND, selection, blocks, self.groups.blocks)
                computed_RD = self.compute(dispatched.x_RD, dispatched.selection)
                output_ND = combine(computed_RD, dispatched)
                sent = sent.new_full((), dispatched.traffic.sent_bytes(self.training))

            # Combine: the sum over blocks, scaled, plus the bias.
            if self.shared is not None:
                shared_ND = self.shared(x_ND, self.config.activation_fn, self.dropout)
                output_ND = output_ND + shared_ND
            if self.config.value_lr_scale != 1:
                output_ND = output_ND * self.config.value_lr_scale
            if self.value_bias is not None:
                output_ND = output_ND + self.value_bias.to(dtype)
        usage = Usage(counts_B, dropped, importance_B, sent, scored, mass, entropy, bias_range)
        return MemoryOutput(output_ND.view(x.shape), selection, balance, z, usage)

    def _select(
        self, x_ND: Tensor, token_ids_NT: Tensor | None, valid_N: Tensor | None, losses: bool
    ) -> Selection:
        """Select the blocks of each token, and compute their gate values."""
        if not self.config.routed_blocks:
            return Selection(torch.zeros(len(x_ND), 0, dtype=torch.int64, device=x_ND.device))
        gate = GATES[self.config.gate_name]
        needs_scores = losses or gate is not None or self.balancer.needs_moments
        inputs = SelectorInput(
            *(x_ND, self.keys, self.key_bias, token_ids_NT, valid_N, needs_scores),
            bias=self.balancer.bias,
            score_function=self.balancer.function,
            values=self.values,
            up=self.up,
            up_bias=self.up_bias,
        )
        if self.groups != ProcessGroups():
            inputs = inputs._replace(
                gather=self.groups.gather,
                gather_tokens=self.groups.gather_tokens,
                stack_over_tokens=self.groups.stack_over_tokens,
            )
        selection: Selection = self.selector(inputs)
        check_selection(self.config, selection, needs_scores, self.groups.shards)
        if gate is not None:
            assert selection.scores is not None
            weights_NA = gate.weights(selection.scores, selection.blocks)
            if self.config.route_scale != 1:
                weights_NA = weights_NA * self.config.route_scale
            selection = selection._replace(weights=weights_NA)
        return selection

    def _losses(
        self,
        selection: Selection,
        counts_B: Tensor,
        counted: Tensor | None,
        valid_N: Tensor | None,
        scope: str,
        split: Split,
    ) -> tuple[Tensor, Tensor]:
        """Compute balance loss and z loss, over the ranks that share tokens."""
        scores, blocks_NA = selection.scores, selection.blocks
        assert scores is not None
        if (choices := self.config.selector_class.balanced_choices) is not None:
            counted = None if counted is None else counted[:, :choices]
            blocks_NA = blocks_NA[:, :choices]
            counts_B = assignment_counts(blocks_NA, self.config.routed_blocks, counted)
        total = None if self.groups.tokens is None else self.groups.sum_over_tokens
        function = self.balancer.function
        z = z_loss(scores, valid_N, total)
        if self.config.selector_class.balance_loss_kind == "entropy":
            return entropy_loss(scores, valid_N, total), z
        if scope == "sequence":
            of_sequences = (scores, blocks_NA, counted, valid_N, split, total, function)
            return sequence_balance_loss(*of_sequences), z
        if scope == "global" and self.training:
            own_B, counts_B = counts_B, counts_B + self.balancer.loss_counts
            if torch.is_grad_enabled():
                self.balancer.loss_counts += own_B
        return balance_loss(scores, counts_B, valid_N, total, function), z

    def reset_buffers(self) -> None:
        """Set the buffers that follow from the config, the biases to 0, and forget the load.

        For a memory that was made on the meta device. The selector's buffers stay as they are.
        """
        super().reset_buffers()
        self.balancer.discard()
        if self.balancer.bias is not None:
            self.balancer.bias.zero_()

    def begin_update(self) -> None:
        """Forget the assignments of an update that was not made."""
        self.balancer.discard()

    def end_update(self) -> None:
        """Move the biases by the assignments of all ranks since the last update.

        Call it after each optimizer update, on all ranks together, if the memory has a
        ``balance_rate`` or a balance loss of scope ``global``.
        """
        self.balancer.step(self.groups.stack_over_tokens)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"cells={config.num_cells}, blocks={config.num_blocks} x {config.block_size}, "
            f"active={config.active_blocks}, selector={config.selector_class.name}, "
            f"gate={config.gate_name}, glu={config.glu}, shared={config.shared_blocks}"
        )
