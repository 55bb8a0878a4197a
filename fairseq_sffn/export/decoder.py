"""fairseq's Transformer decoder for language models, with sparse layers, in plain PyTorch.

It computes what :class:`fairseq.models.transformer.TransformerDecoder` and
:class:`..models.decoder.SparseTransformerDecoder` compute. Parameters and buffers have the names
that they have in a checkpoint of fairseq.

Suffixes of tensor names: B sequences, T positions of a pass, S positions of the cache and the pass,
D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import MemoryConfig, MemoryOutput, Selector, SparseMemory


def gelu_accurate(x: Tensor) -> Tensor:
    """Return fairseq's ``gelu_accurate``, the approximation by tanh."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def gelu(x: Tensor) -> Tensor:
    """Return fairseq's ``gelu``, computed in fp32."""
    return F.gelu(x.float()).type_as(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": gelu,
    "gelu_fast": gelu_accurate,
    "gelu_accurate": gelu_accurate,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
"""Value of fairseq's ``--activation-fn`` -> function."""

GATED: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
"""Value of ``--sffn-glu`` -> function."""


class Cache(Protocol):
    """Keys and values of past positions, such as a ``DynamicCache`` of transformers."""

    def get_seq_length(self) -> int:
        """Return the number of past positions."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, D / H), and return those of all positions."""


class DecoderOutput(NamedTuple):
    """The result of a pass.

    Attributes:
        features: (B, T, D) input of the output projection.
        memories: number of each sparse layer that ran -> the output of its memory.
        inputs: (B, T, D) input of each layer that ran, if they were asked for.
    """

    features: Tensor
    memories: dict[int, MemoryOutput]
    inputs: list[Tensor]


class Decoder(nn.Module):
    """A Transformer decoder with learned or sinusoidal positions and sparse layers.

    Args:
        config: has the attributes of :class:`.description.Description`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.padding_idx: int = config.pad_token_id
        self.embed_scale, self.layerdrop = config.embed_scale, config.layerdrop
        self.dropout, self.positions = config.dropout, config.positions
        self.max_positions: int = config.max_position_embeddings
        width, embedded = config.hidden_size, config.input_size
        self.version: Tensor
        self.register_buffer("version", torch.tensor([3.0]))  # of fairseq's decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, embedded, self.padding_idx)
        self.project_in_dim = None
        if embedded != width:
            self.project_in_dim = nn.Linear(embedded, width, bias=False)
        self.embed_positions = None
        if self.positions == "learned":
            rows = config.max_position_embeddings + self.padding_idx + 1
            self.embed_positions = nn.Embedding(rows, width, self.padding_idx)
        self.layernorm_embedding = nn.LayerNorm(width) if config.embedding_norm else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(width) if config.final_norm else None
        self.project_out_dim = None
        if config.output_size != width:
            self.project_out_dim = nn.Linear(width, config.output_size, bias=False)
        self.output_projection = None  # the embedding, if it is tied
        if not config.tied_embeddings:
            self.output_projection = nn.Linear(config.output_size, config.vocab_size, bias=False)
        memories = self.memories().values()
        contexts = [memory.config.context_tokens for memory in memories]
        self.context_tokens: int = max([1, *contexts])

    def memories(self) -> dict[int, SparseMemory]:
        """Return number of each sparse layer -> its memory."""
        return {
            number: layer.fc1.memory
            for number, layer in enumerate(self.layers)
            if isinstance(layer.fc1, SparseFFN)
        }

    def forward(
        self,
        ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        context_ids: Tensor | None = None,
        losses: bool = False,
        balance_scope: str = "micro",
        keep_inputs: bool = False,
    ) -> DecoderOutput:
        """Run the layers.

        Args:
            ids_BT: token ids of the new positions.
            attention_mask: (B, S), zero at padding, for the positions in the cache and the new
                ones. Without it, padding ids among the new positions are padding, and past
                positions are not.
            position_ids: (B, T) positions from 0; ``None``: counted over what is not padding.
            cache: past positions. The pass appends the new ones.
            context_ids: (B, any) the token ids before ``ids_BT``. Needed with a filled cache if a
                selector reads more than one token id.
            losses: whether memories compute their balance and z losses.
            balance_scope: see :meth:`~..memory.SparseMemory.forward`.
            keep_inputs: whether to return the inputs of the layers.

        Raises:
            ValueError: a shape does not fit, ``context_ids`` are missing, or the sequences are
                longer than the model's context.
        """
        past = 0 if cache is None else int(cache.get_seq_length())
        _batch, length = ids_BT.shape
        valid_BS = self._valid(ids_BT, attention_mask, past)
        self._check_length(valid_BS)
        valid_BT = valid_BS[:, past:]
        ids_BT = ids_BT.masked_fill(~valid_BT, self.padding_idx)
        x_BTD = self._embed(ids_BT, valid_BS, position_ids)
        token_ids_BTC = self._trailing_ids(ids_BT, valid_BS, context_ids, past)
        # A query sees the keys up to itself that are not padding. Padding sees itself, because the
        # softmax of no key is not a number.
        order_T = torch.arange(past, past + length, device=ids_BT.device)
        order_S = torch.arange(past + length, device=ids_BT.device)
        seen_BTS = (order_S <= order_T.unsqueeze(1)) & valid_BS.unsqueeze(1)
        seen_B1TS = (seen_BTS | (order_S == order_T.unsqueeze(1))).unsqueeze(1)
        memories: dict[int, MemoryOutput] = {}
        inputs: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            if self.training and self.layerdrop and torch.rand(()).item() < self.layerdrop:
                continue
            if keep_inputs:
                inputs.append(x_BTD)
            x_BTD, found = layer(
                x_BTD, seen_B1TS, cache, token_ids_BTC, ~valid_BT, losses, balance_scope
            )
            if found is not None:
                memories[number] = found
        if self.layer_norm is not None:
            x_BTD = self.layer_norm(x_BTD)
        if self.project_out_dim is not None:
            x_BTD = self.project_out_dim(x_BTD)
        return DecoderOutput(x_BTD, memories, inputs)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of all token ids: (..., D) -> (..., V)."""
        projection = self.output_projection
        return F.linear(features, (projection or self.embed_tokens).weight)

    def _valid(self, ids_BT: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
        """Return which positions of the cache and the pass are not padding: (B, S) bool."""
        batch, length = ids_BT.shape
        if attention_mask is None:
            before = ids_BT.new_ones(batch, past, dtype=torch.bool)
            return torch.cat([before, ids_BT.ne(self.padding_idx)], dim=1)
        if tuple(attention_mask.shape) != (batch, past + length):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} does not fit: expected "
                f"{(batch, past + length)}, for {past} past and {length} new positions"
            )
        return attention_mask.to(ids_BT.device).bool()

    def _check_length(self, valid_BS: Tensor) -> None:
        if valid_BS.shape[1] <= self.max_positions:
            return
        if (length := int(valid_BS.sum(dim=1).max())) > self.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the model's context of "
                f"{self.max_positions} (max_position_embeddings)"
            )

    def _embed(self, ids_BT: Tensor, valid_BS: Tensor, position_ids: Tensor | None) -> Tensor:
        x_BTD: Tensor = self.embed_scale * self.embed_tokens(ids_BT)
        if self.project_in_dim is not None:
            x_BTD = self.project_in_dim(x_BTD)
        if self.positions != "none":
            valid_BT = valid_BS[:, valid_BS.shape[1] - ids_BT.shape[1] :]
            if position_ids is None:
                position_ids = valid_BS.cumsum(dim=1)[:, -ids_BT.shape[1] :] - 1
            # fairseq's positions start behind the padding id, which is the position of padding.
            rows_BT = (position_ids + 1) * valid_BT + self.padding_idx
            if self.embed_positions is not None:
                x_BTD = x_BTD + self.embed_positions(rows_BT)
            else:
                positions_BTD = sinusoids(rows_BT, x_BTD.shape[-1]) * valid_BT.unsqueeze(-1)
                x_BTD = x_BTD + positions_BTD.to(x_BTD.dtype)
        if self.layernorm_embedding is not None:
            x_BTD = self.layernorm_embedding(x_BTD)
        return F.dropout(x_BTD, self.dropout, self.training)

    def _trailing_ids(
        self, ids_BT: Tensor, valid_BS: Tensor, context_ids: Tensor | None, past: int
    ) -> Tensor:
        """Return the last ids at each position, as many as a selector reads: (B, T, context)."""
        batch, length = ids_BT.shape
        before = self.context_tokens - 1
        start = ids_BT.new_full((batch, before), self.padding_idx)
        if before and past:
            if context_ids is None or context_ids.shape[1] < min(before, past):
                raise ValueError(
                    f"context_ids: a layer selects by the last {self.context_tokens} token ids; "
                    "give the ids before input_ids along with the cache, as generate() does"
                )
            context_ids = context_ids[:, -past:].masked_fill(
                ~valid_BS[:, :past][:, -context_ids.shape[1] :], self.padding_idx
            )
            start = torch.cat([start, context_ids], dim=1)[:, -before:]
        ids = torch.cat([start, ids_BT], dim=1)
        return torch.stack([ids[:, i : i + length] for i in range(before + 1)], dim=2)


class DecoderLayer(nn.Module):
    """Self-attention and a feed-forward network, dense or sparse.

    Args:
        config: see :class:`Decoder`.
        number: of the layer, from 0.
    """

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.ffn_size
        self.normalize_before, self.dropout = config.normalize_before, config.dropout
        self.activation_dropout = config.activation_dropout
        self.self_attn = Attention(config, number)
        self.c_attn = None
        if config.scale_heads:
            self.c_attn = nn.Parameter(torch.ones(config.num_attention_heads))
        self.attn_ln = nn.LayerNorm(width) if config.scale_attn else None
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1: nn.Module
        self.fc2: nn.Module
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.activation]
        fields = config.memories.get(str(number))
        if fields is not None:
            self.fc1, self.fc2 = SparseFFN(memory_config_of(fields, config)), nn.Identity()
        elif config.glu is not None:
            self.fc1, self.fc2 = GatedLinear(width, hidden, config.glu), nn.Linear(hidden, width)
        else:
            self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden) if config.scale_fc else None
        self.w_resid = nn.Parameter(torch.ones(width)) if config.scale_resids else None
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BTD: Tensor,
        seen_B1TS: Tensor,
        cache: Cache | None,
        token_ids_BTC: Tensor,
        padding_BT: Tensor,
        losses: bool,
        balance_scope: str,
    ) -> tuple[Tensor, MemoryOutput | None]:
        """Run the layer.

        Args:
            x_BTD: hidden states.
            seen_B1TS: bool, which keys a query sees.
            cache: see :meth:`Decoder.forward`.
            token_ids_BTC: trailing token ids of each position, the current one last.
            padding_BT: bool, ``True`` at padding.
            losses, balance_scope: see :meth:`~..memory.SparseMemory.forward`.

        Returns:
            The hidden states, and the output of the memory; ``None``: the layer is dense.
        """
        residual = x_BTD
        if self.normalize_before:
            x_BTD = self.self_attn_layer_norm(x_BTD)
        x_BTD = self.self_attn(x_BTD, seen_B1TS, cache)
        if self.c_attn is not None:
            heads_BTHd = x_BTD.unflatten(-1, (len(self.c_attn), -1))
            x_BTD = (heads_BTHd * self.c_attn.unsqueeze(-1)).flatten(-2)
        if self.attn_ln is not None:
            x_BTD = self.attn_ln(x_BTD)
        x_BTD = residual + F.dropout(x_BTD, self.dropout, self.training)
        if not self.normalize_before:
            x_BTD = self.self_attn_layer_norm(x_BTD)

        residual = x_BTD
        if self.normalize_before:
            x_BTD = self.final_layer_norm(x_BTD)
        found = None
        if isinstance(self.fc1, SparseFFN):
            found = self.fc1.memory(
                x_BTD,
                token_ids_BTC,
                padding_mask=padding_BT,
                losses=losses,
                balance_scope=balance_scope,
            )
            x_BTD = found.output
        else:
            x_BTD = self.fc1(x_BTD)
            if not isinstance(self.fc1, GatedLinear):
                x_BTD = self.activation(x_BTD)
            x_BTD = F.dropout(x_BTD, self.activation_dropout, self.training)
            if self.ffn_layernorm is not None:
                x_BTD = self.ffn_layernorm(x_BTD)
            x_BTD = self.fc2(x_BTD)
        x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        if self.w_resid is not None:
            residual = self.w_resid * residual
        x_BTD = residual + x_BTD
        if not self.normalize_before:
            x_BTD = self.final_layer_norm(x_BTD)
        return x_BTD, found


class Attention(nn.Module):
    """Causal self-attention of several heads.

    Args:
        config: see :class:`Decoder`.
        number: of the layer, under which the cache stores its keys.
    """

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        width, self.number = config.hidden_size, number
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, seen_B1TS: Tensor, cache: Cache | None) -> Tensor:
        """Attend; see :meth:`DecoderLayer.forward` for the arguments."""

        def in_heads(projected_BTD: Tensor) -> Tensor:
            return projected_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        queries = in_heads(self.q_proj(x_BTD))
        keys, values = in_heads(self.k_proj(x_BTD)), in_heads(self.v_proj(x_BTD))
        if cache is not None:
            keys, values = cache.update(keys, values, self.number)
        # A cache of fixed size has unused positions at the end.
        unused = keys.shape[2] - seen_B1TS.shape[-1]
        attended_BHTd = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=F.pad(seen_B1TS, (0, unused), value=False),
            dropout_p=self.dropout if self.training else 0.0,
        )
        output: Tensor = self.out_proj(attended_BHTd.transpose(1, 2).flatten(-2))
        return output


class SparseFFN(nn.Module):
    """Holds the memory of a sparse layer, under the name that it has in fairseq's model."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.memory = SparseMemory(config)


class GatedLinear(nn.Module):
    """f(gate_proj(x)) * up_proj(x)."""

    def __init__(self, width: int, hidden: int, glu: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.activation = GATED[glu]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return output


def memory_config_of(fields: Mapping[str, Any], config: Any) -> MemoryConfig:
    """Return a memory's configuration from the plain values that describe it.

    Args:
        fields: see :func:`.description.describe_memory`.
        config: see :class:`Decoder`.
    """
    given = dict(fields)
    selector = Selector.registry[given.pop("selector")]
    options = selector.Config(**given.pop("selector_options"))
    return MemoryConfig(
        embed_dim=config.hidden_size,
        selector=options,
        activation=ACTIVATIONS[config.activation],
        glu=config.glu,
        activation_dropout=config.activation_dropout,
        vocab_size=config.vocab_size,
        # Hash tables are loaded. A new model balances the number of ids.
        token_counts=[1] * config.vocab_size,
        **given,
    )


def sinusoids(rows_BT: Tensor, width: int) -> Tensor:
    """Return fairseq's sinusoidal position embeddings: (B, T, D) in fp32.

    Args:
        rows_BT: positions, counted from fairseq's padding id + 1.
        width: D.
    """
    half = width // 2
    rates = torch.arange(half, dtype=torch.float, device=rows_BT.device)
    rates = torch.exp(rates * -(math.log(10000) / (half - 1)))
    angles = rows_BT.unsqueeze(-1).float() * rates
    table = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return F.pad(table, (0, width % 2))
