"""Bytes of the tensors that autograd keeps from the forward pass for the backward pass.

The bytes are computed from sizes, for a GPU. Fused attention keeps no attention weights. Dropout
keeps one byte for each number. Sparse layers run the engine that a GPU runs. Temporary buffers do
not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from ..memory import MemoryConfig, SparseMemory, gate
from ..memory.compute import ENGINES, choose_engine
from ..memory.compute.engines import EmbeddingBag
from ..memory.compute.tiles import tile_rows
from ..memory.selectors.aoe import AoE
from ..memory.selectors.avgk import AvgK
from ..memory.selectors.learned_gate import LearnedGate
from ..memory.selectors.lorkm import LoRKM
from ..memory.selectors.pkm import PKM
from ..memory.selectors.product_keys import ProductKeys
from ..memory.selectors.vanilla_m import VanillaM, scores_are_cells
from ..models.gated import GatedLinear
from .traffic import visit_probability

FP32, INDEX = torch.float32.itemsize, torch.int64.itemsize
"""Bytes of a number in fp32, and bytes of an index."""


def activation_bytes(
    model: TransformerLanguageModel, tokens: int, context: int, shards: int, dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes that a rank keeps for a micro-batch, by part.

    A layer norm belongs to the part that it precedes. With activation checkpointing, a rank keeps
    the inputs of all layers (``layer_inputs``) and everything in the largest layer.

    Args:
        model: a language model of the plugin or fairseq's ``transformer_lm``, not sharded.
        tokens: tokens of the micro-batch.
        context: tokens that a token attends to, at most ``tokens``.
        shards: ranks over which the blocks are to be sharded.
        dtype: dtype of parameters and hidden states.

    Returns:
        Name of the part -> bytes. The parts are ``layer_inputs``, ``attention``, ``dense_ffn``,
        ``selection``, ``memory`` and ``vocabulary``.
    """
    decoder, cfg, size = model.decoder, model.decoder.cfg, dtype.itemsize
    row = tokens * decoder.embed_dim * size
    norm = row + tokens * 2 * FP32  # its input, with mean and deviation
    mask = tokens * decoder.embed_dim if cfg.dropout else 0
    layers = []
    for layer in decoder.layers:
        # x, queries, keys, values and output; for each head, the log-sum-exp in fp32.
        attention = norm + 5 * row + tokens * layer.self_attn.num_heads * FP32 + mask
        memory = next((m for m in layer.modules() if isinstance(m, SparseMemory)), None)
        if memory is None:
            dropout = layer.activation_dropout_module.p
            hidden = tokens * layer.fc2.in_features
            if isinstance(layer.fc1, GatedLinear):
                hidden *= hidden_bytes(layer.fc1.activation, dropout, dtype, gated=True)
            else:
                hidden *= hidden_bytes(layer.activation_fn, dropout, dtype)
            layers.append({"attention": attention, "dense_ffn": norm + row + hidden + mask})
        else:
            kept = memory_bytes(memory, tokens, shards, dtype) + norm + mask
            selection = selection_bytes(memory, tokens, dtype)
            layers.append({"attention": attention, "selection": selection, "memory": kept})
    inputs = 0
    if cfg.checkpoint_activations:
        inputs = 0 if cfg.offload_activations else len(layers) * row
        layers = [max(layers, key=lambda parts: sum(parts.values()))]
    names = ("attention", "dense_ffn", "selection", "memory")
    kept_by = {name: sum(parts.get(name, 0) for parts in layers) for name in names}
    kept_by["attention"] += context**2 * size  # the causal mask, which all layers share
    # Before and after the layers: a mask, norms, the inputs of linear maps, log-probabilities.
    norms = [decoder.layernorm_embedding, decoder.layer_norm]
    maps = [decoder.project_in_dim, decoder.project_out_dim, decoder.output_projection]
    vocabulary = mask + sum(norm for module in norms if module is not None)
    vocabulary += sum(tokens * module.in_features * size for module in maps if module is not None)
    vocabulary += tokens * decoder.output_projection.out_features * FP32
    return {"layer_inputs": inputs, **kept_by, "vocabulary": vocabulary}


def hidden_bytes(
    activation: Callable[[Tensor], Tensor],
    dropout: float,
    dtype: torch.dtype,
    gated: bool = False,
) -> int:
    """Return the bytes kept for a hidden unit of a token.

    The activation function keeps its own tensors. The product with the values keeps the result of
    the activation function, which may be one of those tensors. With dropout, the product keeps the
    result of dropout instead, and dropout keeps its mask.

    Args:
        activation: the activation function.
        dropout: probability of dropout after it.
        dtype: dtype of the hidden units.
        gated: whether the result is multiplied by a second product, as in a gated FFN.
    """
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = activation(torch.zeros(1, dtype=dtype, requires_grad=True))
        if gated:
            result = result * torch.zeros(1, dtype=dtype, requires_grad=True)
    numbers = kept if dropout else [*kept, result]
    sizes = {number.data_ptr(): number.itemsize for number in numbers}
    return sum(sizes.values()) + (dtype.itemsize + 1 if dropout else 0)


def selection_bytes(memory: SparseMemory, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that a selector keeps besides x.

    A balance loss counts only if the selector has one by default.

    Args:
        memory: the sparse layer.
        tokens: tokens of the micro-batch.
        dtype: dtype of parameters and hidden states.
    """
    config, selector, size = memory.config.routed, memory.selector, dtype.itemsize
    if not scores_are_kept(config):
        return 0
    kept, gated = 0, config.gate_name != "none"
    if isinstance(selector, ProductKeys):
        # The queries, also before a layer norm; the scores of both halves; the two indices into the
        # halves for each selected score.
        heads, left, half_query = selector.left.shape
        queries = 2 * half_query * (2 if isinstance(selector.norm, nn.LayerNorm) else 1)
        kept += tokens * heads * (queries + left + selector.right.shape[1]) * size
        kept += 2 * tokens * config.active_blocks * INDEX
    else:
        # The scores from which a gate picks, and the probabilities of all blocks.
        wide = FP32 if isinstance(selector, LearnedGate) else size
        cls = config.selector_class
        shares = config.gate_name == "softmax" or cls.default_balance_weight
        kept += tokens * config.num_blocks * (wide * gated + FP32 * bool(shares))
        softmax = gate.score_function(config.gate_name) in ("logits", "softmax")
        if cls.default_balance_weight and cls.balance_loss_kind == "load" and not softmax:
            kept += tokens * (config.num_blocks + 1) * FP32  # the scores before the division
        kept += tokens * gate_bytes(config.gate_name, config.active_blocks)
    if isinstance(selector, VanillaM) and gated:
        separate = not scores_are_cells(config.block_size, selector.aggregate)
        kept += tokens * config.num_cells * size * separate  # pre-activations of all cells
    if isinstance(selector, AvgK):
        kept += config.num_blocks * config.embed_dim * size  # mean keys
        # The lengths of keys and values, their factors, and the product of both factors.
        lengths = selector.normalize_keys + selector.value_norm
        kept += (2 * lengths + (lengths == 2)) * config.num_cells * size
    if isinstance(selector, LearnedGate) and size < FP32:
        kept += (tokens + config.num_blocks) * config.embed_dim * FP32  # copies of x and router
    if isinstance(selector, AoE):
        rank = selector.down.shape[1]
        kept += tokens * config.active_blocks * (rank * size + 2 * INDEX)
        kept += tokens * config.num_blocks * rank * size * gated  # of all blocks, for the norms
    if isinstance(selector, LoRKM):
        kept += tokens * selector.down.out_features * size  # x times the first factor of the keys
    return kept


def gate_bytes(name: str, active_blocks: int) -> int:
    """Return the bytes that a gate keeps for a token, without the weights.

    Args:
        name: the gate.
        active_blocks: blocks per token.
    """
    formed = gate.GATES[name]
    numbers = 0
    if formed is not None and formed.score == "sqrt_softplus":
        numbers += active_blocks  # the logits
    if formed is not None and formed.renormalized and formed.score != "softmax":
        numbers += active_blocks + 1  # the scores before the division, and their sum
    return numbers * FP32


def memory_bytes(memory: SparseMemory, tokens: int, shards: int, dtype: torch.dtype) -> int:
    """Return the bytes that a sparse layer keeps with even routing.

    Layer norm and selector do not count.

    Args:
        memory: the sparse layer, not sharded.
        tokens: tokens of the micro-batch.
        shards: ranks over which the blocks are to be sharded.
        dtype: dtype of parameters and hidden states.
    """
    config, selector, size = memory.config.routed, memory.selector, dtype.itemsize
    width, gated = config.embed_dim, config.gate_name != "none"
    assignments = tokens * config.active_blocks
    shape = config.num_blocks // shards, config.block_size, width
    engine = (
        ENGINES[config.engine]
        if config.engine
        else choose_engine("cuda", dtype, tokens, config.active_blocks, shape)
    )
    uses_bag = isinstance(engine, EmbeddingBag)
    kept = 0
    if shards == 1 or scores_are_kept(config) or memory.shared is not None:
        kept += tokens * width * size  # x, for blocks of this rank, the selector or shared blocks
    if shards > 1:
        # The rows that the blocks of this rank take, and the token of each row that returns.
        rows = round(tokens * shards * visit_probability(config, shards))
        kept += rows * (width * size + INDEX)
        if uses_bag:  # every row has as many slots as the fullest row
            assignments = rows * most_blocks(config, shards)
    # The block of each assignment, or its position in the sorted order.
    kept += assignments * (INDEX if uses_bag else torch.int32.itemsize)
    if not uses_bag:
        # The first assignment of each block; the block and the first assignment of each tile.
        tiles = assignments // tile_rows(assignments, shape[0]) + min(shape[0] + 1, assignments)
        kept += (shape[0] + 2 + 2 * tiles) * torch.int32.itemsize
    if gated:
        # The weights in fp32, and a copy of them if they are sorted or in half precision.
        kept += assignments * (FP32 + (0 if uses_bag and size == FP32 else size))
        # The order of the weights; with several ranks, the indices by which they are sent.
        kept += assignments * INDEX * ((0 if uses_bag else 1) + (3 if shards > 1 else 0))
    dropout: Any = memory.dropout  # torch's or fairseq's
    gated_cells = config.glu is not None
    hidden = hidden_bytes(config.activation_fn, dropout.p, dtype, gated_cells)
    kept += tokens * memory.config.shared_cells * hidden
    passed_by = isinstance(selector, PKM) and selector.uses_softmax
    activation = nn.Identity() if passed_by else config.activation_fn
    hidden = hidden_bytes(activation, dropout.p, dtype, gated_cells)
    if gated or (uses_bag and shards > 1):  # also before the weights, or before empty slots are 0
        hidden += size
    return kept + assignments * config.block_size * hidden


def most_blocks(config: MemoryConfig, shards: int) -> int:
    """Return an estimate of the most blocks of one rank that any token uses.

    The estimate is the mean plus four standard deviations of the hypergeometric distribution.
    """
    blocks, active = config.num_blocks, config.active_blocks
    mean = active / shards
    variance = mean * (1 - 1 / shards) * (blocks - active) / max(blocks - 1, 1)
    return min(active, blocks // shards, math.ceil(mean + 4 * variance**0.5))


def scores_are_kept(config: MemoryConfig) -> bool:
    """Return whether autograd keeps a selector's scores.

    It does if gradients flow through them: from a gate, from a default balance loss, or to the
    selector's own keys.
    """
    cls = config.selector_class
    used = config.gate_name != "none" or cls.default_balance_weight or cls.key_table == "own"
    return cls.scores_blocks and bool(used)
