"""Shared blocks, which every token uses beside those that the selector chooses.

The loops of :mod:`.oracle` check them with every engine, gate and capacity."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_sffn.memory import ConfigError, MemoryConfig, ProcessGroups, Selector, SparseMemory
from fairseq_sffn.memory.selectors.pkm import PKM
from fairseq_sffn.memory.selectors.sigma_moe import SigmaMoE
from fairseq_sffn.memory.sharding import check_sharding
from tests.memory.cases import ENGINES, build, close, tokens
from tests.memory.oracle import Loops

SIZES = {
    **{name: dict(block_size=4, active_blocks=4) for name in ("avgk", "vanilla_m", "lorkm")},
    **{name: dict(block_size=4, active_blocks=4) for name in ("rand_hash", "switch", "gshard")},
    **{name: dict(block_size=4, active_blocks=4) for name in ("moe", "sigma_moe", "hash_moe")},
    "aoe": dict(block_size=4, active_blocks=4),
    **{name: dict(block_size=4, active_blocks=3) for name in ("hash_layer", "base")},
    **{name: dict(block_size=1, active_blocks=6) for name in ("pkm", "pkm_ffn")},
}
"""Selector -> sizes with 2 shared blocks."""
CONFIGS = {"pkm": PKM.Config(heads=2), "sigma_moe": SigmaMoE.Config(expert_dropout=0.0)}


def memory_of(selector: str, **changes) -> SparseMemory:
    config = CONFIGS.get(selector, selector)
    sizes = dict(num_cells=32, shared_blocks=2, **SIZES[selector])
    if Selector.registry[selector].scores_blocks:
        changes.setdefault("gate", "sigmoid")
    return build(selector=config, **{**sizes, **changes})


def own_ffn(memory: SparseMemory, x: Tensor) -> Tensor:
    """Compute the shared blocks as a dense FFN."""
    shared, config = memory.shared, memory.config
    hidden = config.activation_fn(F.linear(x, shared.keys, shared.key_bias))
    if config.glu:
        hidden = hidden * F.linear(x, shared.up, shared.up_bias)
    return hidden @ shared.values


def test_every_selector_is_here():
    names = {cls.name for cls in Selector.registry.values() if cls.__module__.startswith("fairseq")}
    assert SIZES.keys() == names


@pytest.mark.parametrize("glu", [None, "silu"])
@pytest.mark.parametrize("selector", SIZES)
def test_equals_the_loops(selector, glu):
    if glu and Selector.registry[selector].key_table != "full":
        pytest.skip("has no gated cells")
    first = memory_of(selector, glu=glu, capacity_factor=1.5)
    loops = Loops(first, *tokens(9))
    for engine in (None, *ENGINES):
        memory = memory_of(selector, glu=glu, engine=engine, capacity_factor=1.5)
        memory.load_state_dict(first.state_dict())
        out = loops.assert_equal(memory, what=str(engine))
        assert len(out.usage.counts) == memory.config.num_blocks - 2
        assert out.usage.counts.sum() == 9 * (memory.config.active_blocks - 2)


@pytest.mark.parametrize("selector", SIZES)
def test_is_the_sum_of_a_dense_ffn_and_a_memory_without_shared_blocks(selector):
    memory = memory_of(selector)
    routed = SparseMemory(memory.config.routed).double()
    state = {name: t for name, t in memory.state_dict().items() if not name.startswith("shared.")}
    routed.load_state_dict(state)
    assert not routed.config.shared_blocks and routed.shared is None
    x, token_ids = tokens(9)
    out, alone = memory(x, token_ids), routed(x, token_ids)
    close(out.output, alone.output + own_ffn(memory, x), "output", 1e-12)
    assert torch.equal(out.selection.blocks, alone.selection.blocks)
    for got, wanted in zip(out.usage, alone.usage, strict=True):
        assert torch.equal(got, wanted)
    for name in ("balance_loss", "z_loss"):
        assert getattr(out, name) == getattr(alone, name)


@pytest.mark.parametrize("shared", [1, 3, 11, 12])
@pytest.mark.parametrize("glu", [None, "silu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_all_blocks_active_is_a_dense_ffn(bias, glu, shared):
    """With 12 of 12 blocks, nothing is routed. The output and all gradients are those of the dense
    FFN of all cells."""
    sizes = dict(num_cells=48, block_size=4, active_blocks=12, shared_blocks=shared)
    memory = build("avgk-g4", bias=bias, glu=glu, gate="none", capacity_factor=2.0, **sizes)
    names = ["keys", "values", *(["up"] if glu else [])]
    names += [name for name in ("key_bias", *(["up_bias"] if glu else [])) if bias]
    dense = {
        name: torch.cat([getattr(memory.shared, name), getattr(memory, name)])
        .detach()
        .requires_grad_()
        for name in names
    }
    x, _ = tokens(2, 5)
    padding_mask = torch.zeros(2, 5, dtype=torch.bool)
    out = memory(x.requires_grad_(), padding_mask=padding_mask)
    hidden = memory.config.activation_fn(F.linear(x, dense["keys"], dense.get("key_bias")))
    if glu:
        hidden = hidden * F.linear(x, dense["up"], dense.get("up_bias"))
    y = hidden @ dense["values"] + (memory.value_bias if bias else 0)
    close(out.output, y, "output", 1e-12)
    assert out.usage.counts.tolist() == [10] * (12 - shared) and not out.usage.dropped
    assert out.selection.blocks.shape == (10, 12 - shared)
    assert (out.balance_loss is None) == (shared == 12)

    cotangent = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    grads = torch.autograd.grad(y, list(dense.values()), cotangent)
    (got_x,) = torch.autograd.grad(out.output, x, cotangent, retain_graph=True)
    close(got_x, grad_x, "gradient of x", 1e-12)
    out.output.backward(cotangent)
    for name, wanted in zip(dense, grads, strict=True):
        parts = [getattr(memory.shared, name).grad]
        if shared < 12:
            parts.append(getattr(memory, name).grad)
        close(torch.cat(parts), wanted, name, 1e-12)


def test_sizes_of_the_routed_blocks():
    config = memory_of("avgk").config
    assert (config.num_blocks, config.routed_blocks) == (8, 6)
    assert (config.num_cells, config.shared_cells, config.routed_cells) == (32, 8, 24)
    assert config.routed == dataclasses.replace(
        config, num_cells=24, active_blocks=2, shared_blocks=0
    )
    plain = build("avgk-g4").config
    assert plain.routed is plain


@pytest.mark.parametrize("value_lr_scale", [1.0, 4.0])
def test_initial_tables_are_those_of_a_dense_ffn_of_the_active_size(value_lr_scale):
    """The active size counts shared cells. A ``value_lr_scale`` changes no initial value."""
    memory = build(
        *("avgk-glu",),
        **dict(embed_dim=64, num_cells=4096, block_size=64, active_blocks=4, shared_blocks=2),
        value_lr_scale=value_lr_scale,
    )
    dense = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    for tables in (memory, memory.shared):
        for name in ("keys", "up", "key_bias", "up_bias"):
            bound = getattr(tables, name).abs().max().float()
            torch.testing.assert_close(
                bound, 2 * dense[0].weight.abs().max(), rtol=0.1, atol=0, msg=name
            )
        bound = tables.values.abs().max().float() * value_lr_scale
        torch.testing.assert_close(bound, 2 * dense[1].weight.abs().max(), rtol=0.1, atol=0)


def test_a_learning_rate_scale_is_that_of_shared_values_too():
    plain, scaled = build("switch-shared"), build("switch-shared", value_lr_scale=4.0)
    state = plain.state_dict() | {"value_lr_scale": torch.tensor(4.0)}
    state |= {name: state[name] / 4 for name in ("values", "shared.values")}
    scaled.load_state_dict(state)
    x, _ = tokens(8)
    close(scaled(x).output, plain(x).output, tolerance=1e-12)


def test_dropout_reaches_shared_blocks():
    memory, (x, _) = build("avgk-shared"), tokens(8)

    class Zero(nn.Module):
        def forward(self, hidden):
            return torch.zeros_like(hidden)

    memory.dropout = Zero()
    close(memory(x).output, memory.value_bias.expand(8, -1))


def test_gradients_of_replicas_are_not_marked():
    assert not any(hasattr(p, "expert") for p in build("avgk-shared").parameters())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            dict(shared_blocks=3),
            "shared_blocks 3: leaves none of the 3 active blocks to the other 5 ",
        ),
        (dict(shared_blocks=4), "shared_blocks 4: is more than the 3 active blocks"),
        (
            dict(selector="hash_layer", active_blocks=3, shared_blocks=1, vocab_size=10),
            r"active_blocks 2: hash_layer uses one block \(beside shared_blocks 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    sizes = dict(embed_dim=8, num_cells=32, block_size=4, active_blocks=3)
    with pytest.raises(ConfigError, match=f"^{told}"):
        MemoryConfig(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "shards"), [({}, 4), (dict(active_blocks=8, shared_blocks=8), 2)]
)
def test_only_routed_blocks_are_sharded(changes, shards):
    config = memory_of("avgk", **changes).config
    told = rf"shards {shards}: does not divide the {config.routed_blocks} blocks .* not shared"
    with pytest.raises(ConfigError, match=told):
        check_sharding(config, shards)
    check_sharding(memory_of("avgk").config, 3)
    assert build("avgk-shared", groups=ProcessGroups()).shared is not None


def test_checkpoints_with_other_shared_blocks_are_refused():
    with pytest.raises(RuntimeError, match=r"Missing key.*shared\.keys"):
        memory_of("avgk").load_state_dict(memory_of("avgk", shared_blocks=0).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*shared\.keys"):
        memory_of("avgk", shared_blocks=0).load_state_dict(memory_of("avgk").state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for shared\.keys"):
        memory_of("avgk", shared_blocks=1).load_state_dict(memory_of("avgk").state_dict())
