import dataclasses
import pickle

import pytest
import torch

from fairseq_sffn.memory import ConfigError, MemoryConfig, SparseMemory
from fairseq_sffn.memory.selection import SelectorConfig
from fairseq_sffn.memory.selectors.aoe import AoE
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.memory.selectors.gshard import GShard
from fairseq_sffn.memory.selectors.hash_layer import HashLayer
from fairseq_sffn.memory.selectors.lorkm import LoRKM
from fairseq_sffn.memory.selectors.pkm import PKM
from fairseq_sffn.memory.selectors.pkm_ffn import PKMFFN
from fairseq_sffn.memory.selectors.sigma_moe import SigmaMoE
from fairseq_sffn.memory.selectors.switch import Switch
from fairseq_sffn.memory.selectors.vanilla_m import VanillaM
from fairseq_sffn.memory.sharding import SHARDED
from tests.memory.cases import CASES, build

SIZES = dict(embed_dim=8, num_cells=64, block_size=4, active_blocks=4)
HASH = dict(selector="hash_layer", active_blocks=1, vocab_size=10)
BIGRAM = HashLayer.Config(table="bigram")
SINGLE = dict(block_size=1)
SAMPLED = GShard.Config(second_expert="sampled")
BALANCED = {**HASH, "selector": HashLayer.Config(table="balanced")}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        (dict(embed_dim=0), "embed_dim", 0),
        (dict(num_cells=-4), "num_cells", -4),
        (dict(block_size=0), "block_size", 0),
        (dict(active_blocks=0), "active_blocks", 0),
        (dict(block_size=5), "block_size", 5),
        (dict(block_size=128), "block_size", 128),
        (dict(active_blocks=17), "active_blocks", 17),
        (dict(selector="nothing"), "selector", "nothing"),
        (dict(gate="nothing"), "gate", "nothing"),
        (dict(gate=""), "gate", ""),
        (dict(HASH, gate="softmax"), "gate", "softmax"),
        (dict(activation="nothing"), "activation", "nothing"),
        (dict(glu="relu"), "glu", "relu"),
        (dict(glu=True), "glu", True),
        (dict(shared_blocks=-1), "shared_blocks", -1),
        (dict(shared_blocks=4), "shared_blocks", 4),
        (dict(shared_blocks=5), "shared_blocks", 5),
        (dict(shared_blocks=1.0), "shared_blocks", 1.0),
        (dict(shared_blocks=True), "shared_blocks", True),
        (dict(HASH, active_blocks=3, shared_blocks=1), "active_blocks", 2),
        (dict(SINGLE, selector=PKM.Config(heads=4), shared_blocks=1), "heads", 4),
        (dict(SINGLE, selector="pkm", glu="silu"), "glu", "silu"),
        (dict(selector="lorkm", glu="gelu"), "glu", "gelu"),
        (dict(HASH, vocab_size=None), "vocab_size", None),
        (dict(HASH, vocab_size=0), "vocab_size", 0),
        (dict(HASH, vocab_size=-3), "vocab_size", -3),
        (dict(capacity_factor=-1.0), "capacity_factor", -1.0),
        (dict(eval_capacity_factor=-0.5), "eval_capacity_factor", -0.5),
        (dict(capacity_factor=float("nan")), "capacity_factor", "nan"),
        (dict(capacity_factor=float("inf")), "capacity_factor", "inf"),
        (dict(eval_capacity_factor=float("nan")), "eval_capacity_factor", "nan"),
        (dict(eval_capacity_factor=float("inf")), "eval_capacity_factor", "inf"),
        (dict(activation_dropout=1.0), "activation_dropout", 1.0),
        (dict(activation_dropout=-0.1), "activation_dropout", -0.1),
        (dict(activation_dropout=float("nan")), "activation_dropout", "nan"),
        (dict(num_cells="64"), "num_cells", "64"),
        (dict(block_size=4.0), "block_size", 4.0),
        (dict(active_blocks=True), "active_blocks", True),
        (dict(selector=None), "selector", None),
        (dict(selector=SelectorConfig()), "selector", SelectorConfig()),
        (dict(bias="no"), "bias", "no"),
        (dict(selector=AvgK.Config(exclude_bias="no")), "exclude_bias", "no"),
        (dict(selector=AvgK.Config(center=1)), "center", 1),
        (dict(balance_rate="0.1"), "balance_rate", "0.1"),
        (dict(balance_rate=True), "balance_rate", True),
        (dict(capacity_factor="1"), "capacity_factor", "1"),
        (dict(init_scale=None), "init_scale", None),
        (dict(SINGLE, selector=LoRKM.Config(rank=2.5)), "rank", 2.5),
        (dict(SINGLE, selector=PKM.Config(heads=2.0)), "heads", 2.0),
        (dict(SINGLE, selector=PKM.Config(heads=None)), "heads", None),
        (dict(SINGLE, selector=PKMFFN.Config(query_dim="4")), "query_dim", "4"),
        (dict(activation=None), "activation", None),
        (dict(engine="nothing"), "engine", "nothing"),
        (dict(engine="grouped", block_size=1), "engine", "grouped"),
        (dict(engine="grouped", embed_dim=6), "engine", "grouped"),
        (dict(init_scale=0.0), "init_scale", 0.0),
        (dict(init_scale=-1.0), "init_scale", -1.0),
        (dict(value_lr_scale=0.0), "value_lr_scale", 0.0),
        (dict(gate="sigmoid", route_scale=0.0), "route_scale", 0.0),
        (dict(gate="sigmoid", route_scale=-1.0), "route_scale", -1.0),
        (dict(gate="sigmoid", route_scale=float("nan")), "route_scale", "nan"),
        (dict(gate="sigmoid", route_scale=float("inf")), "route_scale", "inf"),
        (dict(route_scale=2.5), "route_scale", 2.5),
        (dict(HASH, route_scale=0.5), "route_scale", 0.5),
        (dict(init_scale=float("nan")), "init_scale", "nan"),
        (dict(init_scale=float("inf")), "init_scale", "inf"),
        (dict(HASH, active_blocks=2), "active_blocks", 2),
        (dict(HASH, selector=HashLayer.Config(table="nothing")), "table", "nothing"),
        (BALANCED, "table", "balanced"),
        (dict(BALANCED, token_counts=[1] * 9), "vocab_size", 10),
        (dict(HASH, selector=BIGRAM, active_blocks=2), "active_blocks", 2),
        (dict(HASH, selector=BIGRAM, vocab_size=None), "vocab_size", None),
        (dict(HASH, selector=BIGRAM, gate="sigmoid"), "gate", "sigmoid"),
        (dict(selector="rand_hash"), "vocab_size", None),
        (dict(selector="rand_hash", vocab_size=3, gate="softmax"), "gate", "softmax"),
        (dict(selector="hash_moe"), "vocab_size", None),
        (dict(selector="hash_moe", vocab_size=3), "token_counts", None),
        (dict(selector="hash_moe", vocab_size=3, token_counts=[1, 2]), "vocab_size", 3),
        (dict(selector=SigmaMoE.Config(expert_dropout=1.0)), "expert_dropout", 1.0),
        (dict(selector=SigmaMoE.Config(expert_dropout=-0.1)), "expert_dropout", -0.1),
        (dict(selector=SigmaMoE.Config(expert_dropout=float("nan"))), "expert_dropout", "nan"),
        (dict(selector=SigmaMoE.Config(expert_dropout="0.1")), "expert_dropout", "0.1"),
        (dict(selector=VanillaM.Config("nothing")), "aggregate", "nothing"),
        (dict(selector=LoRKM.Config("nothing")), "aggregate", "nothing"),
        (dict(selector=LoRKM.Config(rank=0)), "rank", 0),
        (dict(selector=LoRKM.Config(rank=-1)), "rank", -1),
        (dict(selector=LoRKM.Config(rank=9)), "rank", 9),
        (dict(selector=AoE.Config(rank=0)), "rank", 0),
        (dict(selector=AoE.Config(rank=5)), "rank", 5),
        (dict(selector=AoE.Config(rank=9), block_size=16), "rank", 9),
        (dict(selector=AoE.Config(rank=2.0)), "rank", 2.0),
        (dict(selector="pkm"), "block_size", 4),
        (dict(selector="pkm_ffn"), "block_size", 4),
        (dict(SINGLE, selector=PKM.Config(heads=0)), "heads", 0),
        (dict(SINGLE, selector=PKM.Config(heads=-1)), "heads", -1),
        (dict(SINGLE, selector=PKM.Config(heads=3)), "heads", 3),
        (dict(SINGLE, selector=PKM.Config(heads=8)), "heads", 8),
        (dict(SINGLE, selector=PKM.Config(coefficients="nothing")), "coefficients", "nothing"),
        (dict(SINGLE, selector=PKM.Config(query_dim=3)), "query_dim", 3),
        (dict(SINGLE, selector=PKM.Config(query_dim=0)), "query_dim", 0),
        (dict(SINGLE, selector=PKM.Config(query_dim=-2)), "query_dim", -2),
        (dict(SINGLE, selector=PKM.Config(query_norm="batch")), "query_norm", "batch"),
        (dict(SINGLE, selector=PKMFFN.Config(query_norm="batch")), "query_norm", "batch"),
        (dict(SINGLE, selector=PKMFFN.Config(query_dim=5)), "query_dim", 5),
        (dict(selector="base"), "active_blocks", 4),
        (dict(selector="gshard", active_blocks=1), "active_blocks", 1),
        (dict(selector=SAMPLED), "second_expert", "sampled"),
        (dict(selector=GShard.Config("nothing")), "second_expert", "nothing"),
    ],
)
def test_refused_in_one_line(changes, field, value):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig(**{**SIZES, **changes})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{field} {value}: ") and not message.endswith(": ")
    assert (caught.value.field, str(caught.value.value)) == (field, str(value))
    assert isinstance(caught.value, ValueError)


def test_the_message_names_the_other_sizes():
    with pytest.raises(ConfigError, match=r"block_size 5: .* 64 cells"):
        MemoryConfig(**{**SIZES, "block_size": 5})
    with pytest.raises(ConfigError, match=r"active_blocks 17: .* 16 blocks"):
        MemoryConfig(**{**SIZES, "active_blocks": 17})


def test_sizes():
    config = MemoryConfig(**SIZES)
    assert (config.num_blocks, config.active_cells) == (16, 16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_num_params_are_those_of_the_module(case, bias):
    memory = build(case, bias=bias)
    assert memory.config.num_params() == sum(p.numel() for p in memory.parameters())


FIXED = ["hash_layer", "hash_layer-bigram", "base", "gshard-sampled"]


@pytest.mark.parametrize("case", [case for case in CASES if case not in FIXED])
def test_cost_of_every_token_using_everything(case):
    config = build(case).config
    whole = dataclasses.replace(config, active_blocks=config.num_blocks)
    assert whole.active_params() == whole.num_params() == config.num_params()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_active_params_are_those_that_one_token_reaches(case, bias):
    """Count the table rows that get a gradient from one token, and all parameters of the
    selector."""
    if case == "gshard-sampled":
        pytest.skip("counts the second block as used")
    memory = build(case, activation=torch.exp, bias=bias, gate="none")
    out = memory(torch.randn(1, 8).double(), torch.tensor([[3, 4]]))
    out.output.sum().backward()
    config, cells = memory.config.routed, set(out.selection.blocks.flatten().tolist())
    active = sum(p.numel() for p in memory.selector.parameters())
    if memory.shared is not None:
        active += sum(p.numel() for p in memory.shared.parameters())
    for name in SHARDED:
        if (table := getattr(memory, name)) is not None:
            reached = table.grad.reshape(config.num_blocks, -1).any(dim=1)
            assert set(reached.nonzero().flatten().tolist()) == cells
            every = name.startswith("key") and config.selector_class.scores_every_key
            rows = config.num_blocks if every else len(cells)
            active += rows * table[0].numel() * config.block_size
    if bias:
        active += memory.value_bias.numel()
    duplicates = config.active_blocks - len(cells)  # counted once for each head
    assert memory.config.active_params() == active + duplicates * 8


@pytest.mark.parametrize(
    ("changes", "params", "active", "flops"),
    [
        # d = 8, 64 cells, 4 blocks of 4 cells active: keys + values, then biases.
        (dict(), 2 * 64 * 8 + 64 + 8, 2 * 16 * 8 + 16 + 8, 2 * 16 * 8 + 4 * 16 * 8),
        (dict(bias=False), 2 * 64 * 8, 2 * 16 * 8, 2 * 16 * 8 + 4 * 16 * 8),
        (
            dict(selector="switch", block_size=16, active_blocks=1),
            2 * 64 * 8 + 64 + 8 + 4 * 8,
            2 * 16 * 8 + 16 + 8 + 4 * 8,
            2 * 4 * 8 + 4 * 16 * 8,
        ),
        (dict(HASH, block_size=16), 2 * 64 * 8 + 64 + 8, 2 * 16 * 8 + 16 + 8, 4 * 16 * 8),
        # A third table with a bias per cell.
        (
            dict(glu="silu"),
            3 * 64 * 8 + 2 * 64 + 8,
            3 * 16 * 8 + 2 * 16 + 8,
            2 * 16 * 8 + 6 * 16 * 8,
        ),
        # Two shared blocks of three tables; the others are scored.
        (
            dict(glu="gelu", shared_blocks=2),
            3 * 64 * 8 + 2 * 64 + 8,
            3 * 16 * 8 + 2 * 16 + 8,
            2 * 14 * 8 + 6 * 16 * 8,
        ),
        # Shared cells have keys, the others have not.
        (
            dict(selector=LoRKM.Config(rank=3), shared_blocks=1),
            64 * 8 + 8 + 4 * 9 + 3 * 68 + 60,
            16 * 8 + 8 + 4 * 9 + 3 * 68 + 60,
            2 * 3 * 68 + 2 * 16 * 8 + 2 * 4 * 8,
        ),
        # All blocks are shared.
        (
            dict(active_blocks=16, shared_blocks=16),
            2 * 64 * 8 + 64 + 8,
            2 * 64 * 8 + 64 + 8,
            4 * 64 * 8,
        ),
        # All keys take part. The active ones are computed once.
        (
            dict(selector="vanilla_m"),
            2 * 64 * 8 + 64 + 8,
            64 * 8 + 16 * 8 + 64 + 8,
            2 * 64 * 8 + 2 * 16 * 8,
        ),
        (
            dict(selector="vanilla_m", glu="silu"),
            3 * 64 * 8 + 2 * 64 + 8,
            64 * 8 + 2 * 16 * 8 + 64 + 16 + 8,
            2 * 64 * 8 + 4 * 16 * 8,
        ),
        # Rank 3: 8 x 3 and 3 x 64, and a bias per cell.
        (
            dict(selector=LoRKM.Config(rank=3)),
            64 * 8 + 8 + 3 * 72 + 64,
            16 * 8 + 8 + 3 * 72 + 64,
            2 * 3 * 72 + 2 * 16 * 8,
        ),
        # Rank 2: 16 blocks of 2 x 8 and 4 x 2, and a bias per cell.
        (
            dict(selector=AoE.Config(rank=2)),
            64 * 8 + 8 + 2 * (16 * 8 + 64) + 64,
            16 * 8 + 8 + 2 * (16 * 8 + 64) + 64,
            2 * 2 * (16 * 8 + 16) + 2 * 16 * 8,
        ),
        # 4 heads with queries of 4, layer norm over 4, 8 + 8 sub-keys of 2 a head; 8 of 64 cells.
        (
            dict(selector="pkm", block_size=1, active_blocks=8),
            64 * 8 + 8 + 4 * 4 * 9 + 2 * 4 + 4 * 16 * 2,
            8 * 8 + 8 + 4 * 4 * 9 + 2 * 4 + 4 * 16 * 2,
            2 * 4 * 4 * 8 + 2 * 4 * 16 * 2 + 2 * 8 * 8,
        ),
        # One head, query of 6, no norm, 8 + 8 sub-keys of 3.
        (
            dict(selector=PKMFFN.Config(6, "none"), block_size=1, active_blocks=8),
            2 * 64 * 8 + 64 + 8 + 6 * 9 + 16 * 3,
            2 * 8 * 8 + 8 + 8 + 6 * 9 + 16 * 3,
            2 * 6 * 8 + 2 * 16 * 3 + 4 * 8 * 8,
        ),
        (
            dict(selector="rand_hash", vocab_size=10),
            2 * 64 * 8 + 64 + 8,
            2 * 16 * 8 + 16 + 8,
            4 * 16 * 8,
        ),
        *(
            (
                dict(selector=selector, vocab_size=10, token_counts=[1] * 10),
                2 * 64 * 8 + 64 + 8 + 16 * 8,
                2 * 16 * 8 + 16 + 8 + 16 * 8,
                2 * 16 * 8 + 4 * 16 * 8,
            )
            for selector in ("gshard", "moe", "sigma_moe", "hash_moe")
        ),
    ],
    ids=[
        *("avgk", "without bias", "switch", "hash_layer", "avgk-glu", "avgk-glu-shared"),
        *("lorkm-shared", "all shared", "vanilla_m", "vanilla_m-glu", "lorkm", "aoe", "pkm"),
        *("pkm_ffn", "rand_hash", "gshard", "moe", "sigma_moe", "hash_moe"),
    ],
)
def test_cost_by_hand(changes, params, active, flops):
    config = MemoryConfig(**{**SIZES, **changes})
    assert config.num_params() == params
    assert config.active_params() == active
    assert config.flops_per_token() == flops
    keys = 1 + (config.glu is not None)
    own_tables = 1 + keys * (config.selector_class.key_table == "full")
    active = own_tables * (config.active_cells - config.shared_cells)
    active += (1 + keys) * config.shared_cells
    assert config.selection_flops_per_token() == flops - 2 * active * 8


@pytest.mark.parametrize(
    ("case", "gate"),
    [
        ("avgk-g4", "none"),
        ("vanilla_m-g1", "none"),
        ("lorkm-g1", "none"),
        ("pkm", "none"),
        ("pkm_ffn", "sigmoid"),
        ("rand_hash", "none"),
        ("hash_layer", "none"),
        ("switch-top1", "softmax"),
        ("gshard", "renormalized"),
        ("base", "sigmoid"),
        ("moe", "sigmoid_renormalized"),
        ("sigma_moe", "sigmoid"),
        ("hash_moe", "sqrt_softplus_renormalized"),
        ("aoe", "none"),
    ],
)
def test_default_gate(case, gate):
    assert build(case).config.gate_name == gate


@pytest.mark.parametrize("options", [AvgK.Config(), AvgK.Config(exclude_bias=True)])
def test_a_selector_is_named_or_given_as_its_options(options):
    config = MemoryConfig(**SIZES, selector=options)
    assert config.selector_class is AvgK and config.selector_options == options
    assert MemoryConfig(**SIZES, selector="avgk").selector_options == AvgK.Config()


def test_any_function_is_an_activation():
    config = MemoryConfig(**SIZES, activation=torch.sin, bias=False)
    assert config.activation_fn is torch.sin
    memory = SparseMemory(dataclasses.replace(config, active_blocks=16))
    x = torch.randn(3, 8)
    torch.testing.assert_close(memory(x).output, torch.sin(x @ memory.keys.t()) @ memory.values)


@pytest.mark.parametrize(
    "selector", ["avgk", AvgK.Config(exclude_bias=True), "switch", LoRKM.Config(rank=3), BIGRAM]
)
def test_pickles(selector):
    config = MemoryConfig(**{**SIZES, **HASH, "selector": selector})
    assert pickle.loads(pickle.dumps(config)) == config


def test_default_options_pickle():
    config = MemoryConfig(**SIZES, selector=Switch.Config())
    assert pickle.loads(pickle.dumps(config)) == config
