"""Bytes of the tensors that autograd keeps from the forward pass for the backward pass.

They are computed from sizes, for GPUs: fused attention keeps none of its weights, dropout keeps a
byte for a number, and sparse layers run the engine that a GPU runs. Temporary buffers are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from ..memory import MemoryConfig, SparseMemory
from ..memory.compute import ENGINES, choose_engine
from ..memory.compute.engines import EmbeddingBag
from ..memory.compute.tiles import tile_rows
from ..memory.selectors.avgk import AvgK
from ..memory.selectors.learned_gate import LearnedGate
from ..memory.selectors.lorkm import LoRKM
from ..memory.selectors.pkm import PKM
from ..memory.selectors.product_keys import ProductKeys
from ..memory.selectors.vanilla_m import VanillaM, scores_are_cells
from .traffic import visit_probability

FP32, INDEX = torch.float32.itemsize, torch.int64.itemsize
"""Bytes of a number that needs full precision, and of an index."""


def activation_bytes(
    model: TransformerLanguageModel, tokens: int, context: int, shards: int, dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes that a rank keeps for a micro-batch, by part.

    A layer norm belongs to the part that it precedes. With activation checkpointing these are the
    inputs of all layers, ``layer_inputs``, and everything in one layer.

    Args:
        model: a language model of the plugin or fairseq's ``transformer_lm``, not sharded.
        tokens: tokens of the micro-batch.
        context: tokens that a token attends to, at most ``tokens``.
        shards: ranks over which the blocks are to be sharded.
        dtype: dtype of parameters and hidden states.
    """
    decoder, cfg, size = model.decoder, model.decoder.cfg, dtype.itemsize
    row = tokens * decoder.embed_dim * size
    norm = row + tokens * 2 * FP32  # its input, with mean and deviation
    mask = tokens * decoder.embed_dim if cfg.dropout else 0
    layers = []
    for layer in decoder.layers:
        # x; queries, keys, values and output; for each head the logarithm of a sum.
        attention = norm + 5 * row + tokens * layer.self_attn.num_heads * FP32 + mask
        memory = next((m for m in layer.modules() if isinstance(m, SparseMemory)), None)
        if memory is None:
            dropout = layer.activation_dropout_module.p
            hidden = tokens * layer.fc1.out_features
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
    kept_by["attention"] += context**2 * size  # the causal mask, of all layers
    # Before and after the layers: a mask, norms, the inputs of linear maps, log-probabilities.
    norms = [decoder.layernorm_embedding, decoder.layer_norm]
    maps = [decoder.project_in_dim, decoder.project_out_dim, decoder.output_projection]
    vocabulary = mask + sum(norm for module in norms if module is not None)
    vocabulary += sum(tokens * module.in_features * size for module in maps if module is not None)
    vocabulary += tokens * decoder.output_projection.out_features * FP32
    return {"layer_inputs": inputs, **kept_by, "vocabulary": vocabulary}


def hidden_bytes(activation: Callable[[Tensor], Tensor], dropout: float, dtype: torch.dtype) -> int:
    """Return the bytes kept for a hidden unit of a token.

    Kept are what the activation function keeps, and its result, which is multiplied by the values;
    they may be one number. With dropout the result is another number, and the mask is kept.
    """
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = activation(torch.zeros(1, dtype=dtype, requires_grad=True))
    numbers = kept if dropout else [*kept, result]
    sizes = {number.data_ptr(): number.itemsize for number in numbers}
    return sum(sizes.values()) + (dtype.itemsize + 1 if dropout else 0)


def selection_bytes(memory: SparseMemory, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that a selector keeps besides x. A balance loss counts if it is the
    selector's default."""
    config, selector, size = memory.config, memory.selector, dtype.itemsize
    if not scores_are_kept(config):
        return 0
    kept, gated = 0, config.gate_name != "none"
    if isinstance(selector, ProductKeys):
        # Queries, and as they were before their norm; the two halves of the scores; by which two
        # numbers of halves each selected score is found.
        heads, left, half_query = selector.left.shape
        queries = 2 * half_query * (2 if isinstance(selector.norm, nn.LayerNorm) else 1)
        kept += tokens * heads * (queries + left + selector.right.shape[1]) * size
        kept += 2 * tokens * config.active_blocks * INDEX
    else:
        # The scores that a gate picks from, and the probabilities of all blocks.
        wide = FP32 if isinstance(selector, LearnedGate) else size
        normalised = config.gate_name == "softmax" or config.selector_class.default_balance_weight
        kept += tokens * config.num_blocks * (wide * gated + FP32 * bool(normalised))
    if isinstance(selector, VanillaM) and gated:
        apart = not scores_are_cells(config.block_size, selector.aggregate)
        kept += tokens * config.num_cells * size * apart  # pre-activations of all cells
    if isinstance(selector, AvgK):
        kept += config.num_blocks * config.embed_dim * size  # mean keys
    if isinstance(selector, LearnedGate) and size < FP32:
        kept += (tokens + config.num_blocks) * config.embed_dim * FP32  # copies of x and router
    if isinstance(selector, LoRKM):
        kept += tokens * selector.down.out_features * size  # x times the first factor of the keys
    return kept


def memory_bytes(memory: SparseMemory, tokens: int, shards: int, dtype: torch.dtype) -> int:
    """Return the bytes that a sparse layer keeps, without its layer norm and its selector, where
    routing is even."""
    config, selector, size = memory.config, memory.selector, dtype.itemsize
    width, gated = config.embed_dim, config.gate_name != "none"
    assignments = tokens * config.active_blocks
    shape = config.num_blocks // shards, config.block_size, width
    engine = (
        ENGINES[config.engine]
        if config.engine
        else choose_engine("cuda", dtype, tokens, config.active_blocks, shape)
    )
    bags = isinstance(engine, EmbeddingBag)
    kept = 0
    if shards == 1 or scores_are_kept(config):
        kept += tokens * width * size  # x, which blocks here multiply, or a selector does
    if shards > 1:
        # Rows that blocks here multiply, and the tokens whose rows come back.
        rows = round(tokens * shards * visit_probability(config, shards))
        kept += rows * (width * size + INDEX)
        if bags:  # every row has as many slots as the fullest
            assignments = rows * most_blocks(config, shards)
    kept += assignments * (
        INDEX if bags else torch.int32.itemsize
    )  # block, or place, of each assignment
    if not bags:
        # Where the assignments of a block start, and the block and first assignment of each tile.
        tiles = assignments // tile_rows(assignments, shape[0]) + min(shape[0] + 1, assignments)
        kept += (shape[0] + 2 + 2 * tiles) * torch.int32.itemsize
    if gated:
        # Weights; sorted, or in half precision, they are another number.
        kept += assignments * (FP32 + (0 if bags and size == FP32 else size))
        # The blocks they are of; where they travel, who sends and receives.
        kept += assignments * INDEX * ((0 if bags else 1) + (3 if shards > 1 else 0))
    passed_by = isinstance(selector, PKM) and selector.uses_softmax
    activation = nn.Identity() if passed_by else config.activation_fn
    dropout: Any = memory.dropout  # torch's or fairseq's
    hidden = hidden_bytes(activation, dropout.p, dtype)
    if gated or (bags and shards > 1):  # before and after they are weighed, or slots left empty
        hidden += size
    return kept + assignments * config.block_size * hidden


def most_blocks(config: MemoryConfig, shards: int) -> int:
    """Return how many blocks of a rank a token uses at most, among many tokens: four standard
    deviations of the hypergeometric distribution above the mean."""
    blocks, active = config.num_blocks, config.active_blocks
    mean = active / shards
    variance = mean * (1 - 1 / shards) * (blocks - active) / max(blocks - 1, 1)
    return min(active, blocks // shards, math.ceil(mean + 4 * variance**0.5))


def scores_are_kept(config: MemoryConfig) -> bool:
    """Return whether gradients flow through a selector's scores: to a gate, to a balance loss that
    is the default, or to the selector's own keys. Otherwise autograd keeps no scores."""
    cls = config.selector_class
    used = config.gate_name != "none" or cls.default_balance_weight or cls.key_table == "own"
    return cls.scores_blocks and bool(used)
