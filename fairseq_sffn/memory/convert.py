"""Memories from the sparse blocks of other libraries' models, with equal outputs.

Each function takes the weights of one block, and the configuration of the model, which says what
the weights do not::

    memory = from_mixtral(model.model.layers[0].mlp, model.config)
    memory = from_mixtral(tensors, settings, "model.layers.0.block_sparse_moe.")

The weights are a module of transformers, or a mapping from names to tensors, such as a state dict
or the tensors of a safetensors file. The configuration is that of transformers, or the content of
``config.json``. Both layouts are read: one tensor for all experts, as in modules of transformers 5,
and one for each expert, as in published checkpoints and in modules of transformers 4.

The tables are copies in the dtype and on the device of the experts. Tensors are read one by one.
With a mapping that loads a tensor when it is read, no more is in memory than the new tables and one
such tensor.

A memory computes its scores in fp32. In half precision, a router that does not may choose another
expert where two scores are almost equal. Noise on the router's input in training ("jitter") is not
carried over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import MemoryConfig
from .sparse_memory import SparseMemory
from .validation import ConfigError

Weights = nn.Module | Mapping[str, Tensor]

ACTIVATIONS = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "tanh": "tanh"}
"""Name of an activation function in transformers -> ours."""

PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of an expert's keys, up and values."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def from_mixtral(weights: Weights, config: Any, prefix: str = "") -> SparseMemory:
    """Convert a Mixtral block: top experts by a softmax, renormalised (``MixtralSparseMoeBlock``).

    Args:
        weights: the block, or its tensors by name.
        config: the configuration of its model, or the content of ``config.json``.
        prefix: of the names in ``weights``, up to ``gate.weight``.

    Raises:
        ConfigError: a tensor or a setting is missing, or has no counterpart.
    """
    block = _Block(weights, config, prefix)
    return block.whole(_gated_memory(block, "renormalized"))


def from_qwen_moe(weights: Weights, config: Any, prefix: str = "") -> SparseMemory:
    """Convert a block of Qwen3-MoE: top experts by a softmax, renormalised if the model says so.

    Blocks of Qwen2-MoE have a shared expert with a gate of its own. They are refused.

    Args:
        weights, config, prefix: see :func:`from_mixtral`.

    Raises:
        ConfigError: a tensor or a setting is missing, or has no counterpart.
    """
    block = _Block(weights, config, prefix)
    for name in ("shared_expert_gate.weight", "shared_expert.gate_proj.weight"):
        if name in block:
            raise ConfigError("weights", name, "a shared expert with a gate has no counterpart")
    gate = "renormalized" if block["norm_topk_prob"] else "softmax"
    return block.whole(_gated_memory(block, gate))


def from_olmoe(weights: Weights, config: Any, prefix: str = "") -> SparseMemory:
    """Convert a block of OLMoE (``OlmoeSparseMoeBlock``), which is built like Qwen3-MoE's.

    Args:
        weights, config, prefix: see :func:`from_mixtral`.

    Raises:
        ConfigError: a tensor or a setting is missing, or has no counterpart.
    """
    return from_qwen_moe(weights, config, prefix)


def from_deepseek_v3(
    weights: Weights, config: Any, prefix: str = "", balance_rate: float = 0.001
) -> SparseMemory:
    """Convert a block of DeepSeek-V3 or of a model built like it (``DeepseekV3MoE``).

    Top experts by sigmoids plus a bias, renormalised if the model says so, times a scale, beside
    shared experts. Experts in several groups are refused: no selector chooses groups first.

    Args:
        weights, config, prefix: see :func:`from_mixtral`.
        balance_rate: step of the bias in :meth:`.sparse_memory.SparseMemory.end_update`, which was
            0.001 for DeepSeek-V3. Without such calls the bias stays.

    Raises:
        ConfigError: a tensor or a setting is missing, or has no counterpart.
    """
    block = _Block(weights, config, prefix)
    if (groups := block.get("n_group", 1)) != 1:
        raise ConfigError("n_group", groups, "no selector chooses groups of experts; must be 1")
    if (function := block.get("scoring_func", "sigmoid")) != "sigmoid":
        raise ConfigError("scoring_func", function, "is not the sigmoid of DeepSeek-V3")
    memory = _gated_memory(
        block,
        "sigmoid_renormalized" if block["norm_topk_prob"] else "sigmoid",
        shared_blocks=block.get("n_shared_experts", 0) or 0,
        route_scale=float(block["routed_scaling_factor"]),
        balance_rate=balance_rate,
    )
    if memory.balancer.bias is None:
        raise ConfigError("balance_rate", balance_rate, "must be positive: the block has a bias")
    memory.balancer.bias.copy_(block.tensor("gate.e_score_correction_bias"))
    return block.whole(memory)


def from_switch(weights: Weights, config: Any, prefix: str = "") -> SparseMemory:
    """Convert a block of Switch Transformers (``SwitchTransformersSparseMLP``).

    The memory drops no tokens. The outputs are equal where no expert has more tokens of a sequence
    than the ``expert_capacity`` of transformers. There, tokens above it have the output 0.

    Args:
        weights, config: see :func:`from_mixtral`.
        prefix: of the names in ``weights``, up to ``router.classifier.weight``.

    Raises:
        ConfigError: a tensor or a setting is missing, or has no counterpart.
    """
    block = _Block(weights, config, prefix)
    if "router.classifier.bias" in block:
        raise ConfigError("router_bias", True, "scores have no bias here")
    router_BD = block.tensor("router.classifier.weight")
    first_GD = block.tensor("experts.expert_0.wi.weight")
    (num_blocks, width), cells = router_BD.shape, len(first_GD)
    memory = _empty_memory(
        MemoryConfig(
            *(width, num_blocks * cells, cells, 1),
            selector="switch",
            activation=block.activation("dense_act_fn"),
            bias=False,
            activation_dropout=float(block.get("dropout_rate", 0.0)),
        ),
        *(first_GD, router_BD, block),
    )
    keys_BGD, values_BGD = _in_blocks(memory.keys, cells), _in_blocks(memory.values, cells)
    for number in range(num_blocks):
        keys_BGD[number].copy_(block.tensor(f"experts.expert_{number}.wi.weight"))
        values_BGD[number].copy_(block.tensor(f"experts.expert_{number}.wo.weight").t())
    return block.whole(memory)


class _Block:
    """The tensors of a block, and the settings of its model.

    Args:
        weights, config, prefix: see :func:`from_mixtral`.
    """

    def __init__(self, weights: Weights, config: Any, prefix: str) -> None:
        self.training = not isinstance(weights, nn.Module) or weights.training
        self.tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
        self.config, self.prefix = config, prefix
        self.used: set[str] = set()  # names of the tensors that were read

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its name in the block."""
        try:
            tensor = self.tensors[self.prefix + name]
        except KeyError:
            reason = "is not there: is the block sparse?"
            raise ConfigError("weights", self.prefix + name, reason) from None
        self.used.add(self.prefix + name)
        return tensor.detach()

    def whole(self, memory: SparseMemory) -> SparseMemory:
        """Return a memory that was made of the block, if nothing of the block is left out."""
        for name in self.tensors:
            if name.startswith(self.prefix) and name not in self.used:
                raise ConfigError("weights", name, "has no counterpart: is it another block?")
        return memory

    def get(self, name: str, default: Any) -> Any:
        """Return a setting of the model."""
        if isinstance(self.config, Mapping):
            return self.config.get(name, default)
        return getattr(self.config, name, default)

    def __getitem__(self, name: str) -> Any:
        if (setting := self.get(name, None)) is None:
            raise ConfigError(name, None, "is not in the configuration of the model")
        return setting

    def activation(self, setting: str) -> str:
        """Return our name of the model's activation function."""
        if (name := self[setting]) not in ACTIVATIONS:
            raise ConfigError(setting, name, f"is none of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]


def _gated_memory(block: _Block, gate: str, shared_blocks: int = 0, **changes: Any) -> SparseMemory:
    """Build a memory of gated cells from a block with a linear router.

    Args:
        block: its tensors and settings.
        gate: see ``MemoryConfig.gate``.
        shared_blocks: number of shared experts.
        changes: other fields of ``MemoryConfig``.
    """
    router_BD = block.tensor("gate.weight")
    num_blocks, width = router_BD.shape
    fused = "experts.gate_up_proj" in block
    names = PROJECTIONS[int("experts.0.w1.weight" in block)]
    if fused:
        like = block.tensor("experts.gate_up_proj")
        cells = like.shape[1] // 2
    else:
        like = block.tensor(f"experts.0.{names[0]}.weight")
        cells = len(like)
    memory = _empty_memory(
        MemoryConfig(
            *(width, (num_blocks + shared_blocks) * cells, cells),
            active_blocks=int(block["num_experts_per_tok"]) + shared_blocks,
            shared_blocks=shared_blocks,
            selector="moe",
            gate=gate,
            glu=block.activation("hidden_act"),
            bias=False,
            **changes,
        ),
        *(like, router_BD, block),
    )
    del like
    keys_BGD, up_BGD, values_BGD = (
        _in_blocks(table, cells) for table in (memory.keys, memory.up, memory.values)
    )
    if fused:
        gate_up_BXD = block.tensor("experts.gate_up_proj")
        keys_BGD.copy_(gate_up_BXD[:, :cells])
        up_BGD.copy_(gate_up_BXD[:, cells:])
        del gate_up_BXD
        values_BGD.copy_(block.tensor("experts.down_proj").transpose(1, 2))
    else:
        for number in range(num_blocks):
            key_name, up_name, value_name = (f"experts.{number}.{name}.weight" for name in names)
            keys_BGD[number].copy_(block.tensor(key_name))
            up_BGD[number].copy_(block.tensor(up_name))
            values_BGD[number].copy_(block.tensor(value_name).t())
    if (shared := memory.shared) is not None:
        assert shared.up is not None
        shared.keys.detach().copy_(block.tensor("shared_experts.gate_proj.weight"))
        shared.up.detach().copy_(block.tensor("shared_experts.up_proj.weight"))
        shared.values.detach().copy_(block.tensor("shared_experts.down_proj.weight").t())
    return memory


def _empty_memory(
    config: MemoryConfig, like: Tensor, router_BD: Tensor, block: _Block
) -> SparseMemory:
    """Build a memory without drawing its tables.

    Args:
        config: its sizes and choices.
        like: a tensor in the dtype and on the device of the tables.
        router_BD: copied, in its own dtype.
        block: whether the memory trains, as the block does.
    """
    if like.dtype not in DTYPES:
        raise ConfigError("weights", like.dtype, "quantised experts have no counterpart")
    with torch.device("meta"):
        memory = SparseMemory(config)
    memory = memory.to(like.dtype).to_empty(device=like.device)
    memory.reset_buffers()
    assert isinstance(memory.selector.router, nn.Parameter)
    memory.selector.router = nn.Parameter(router_BD.to(like.device, copy=True))
    return memory.train(block.training)


def _in_blocks(table: Tensor | None, cells: int) -> Tensor:
    """Return a table as (B, G, D), to write into."""
    assert table is not None
    return table.detach().unflatten(0, (-1, cells))
