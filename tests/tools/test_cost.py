"""Parameters and FLOPs, by hand, by PyTorch's counter, and as in the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq_sffn.tools import cost
from fairseq_sffn.tools.cost import Cost, cost_by_part, dense_counterpart, model_cost, total
from tests.models.small_lm import (
    FFN,
    METHODS,
    PLAN,
    TYPES,
    WIDTH,
    build,
    lm_config,
    random_tokens,
    small_lm,
)

LAYERS, CELLS = 2, 16 * FFN
CONTEXT = 12

TIED = {tied: {"share_decoder_input_output_embed": tied} for tied in (True, False)}
UNEQUAL = {"decoder_input_dim": 8, "decoder_output_dim": 24} | TIED[False]

# The sparse layer of a small model, by hand
OWN_KEYS = ("aoe", "lorkm", "pkm", "pkm_4d")
ACTIVE_CELLS = {"pkm": 16, "gshard_8d": 2 * FFN}
RANK, QUERY, SUB_KEYS = 2, 8, 16 + 32


def product_keys(heads: int) -> tuple[int, int]:
    """Return parameters and FLOPs of the query network and the sub-keys, each for half a query."""
    queries, sub_keys = heads * QUERY, heads * SUB_KEYS * QUERY // 2
    return queries * (WIDTH + 1) + 2 * QUERY + sub_keys, 2 * WIDTH * queries + 2 * sub_keys


SELECTION = {
    "aoe": (32 * WIDTH + CELLS + CELLS, 2 * (32 * WIDTH + FFN)),
    "avgk": (0, 2 * 64 * WIDTH),
    "vanilla_m": (0, 2 * (CELLS - FFN) * WIDTH),
    "lorkm": (RANK * (WIDTH + CELLS) + CELLS, 2 * RANK * (WIDTH + CELLS)),
    "pkm": product_keys(heads=4),
    "pkm_4d": product_keys(heads=4),
    "pkm_ffn": product_keys(heads=1),
    "rand_hash": (0, 0),
    "hash_layer": (0, 0),
    "switch": (16 * WIDTH, 2 * 16 * WIDTH),
    "gshard": (32 * WIDTH, 2 * 32 * WIDTH),
    "gshard_8d": (16 * WIDTH, 2 * 16 * WIDTH),
    "base": (16 * WIDTH, 2 * 16 * WIDTH),
    **dict.fromkeys(("moe", "sigma_moe", "hash_moe"), (64 * WIDTH, 2 * 64 * WIDTH)),
}
"""Method -> parameters and FLOPs of selecting blocks."""


def memory_by_hand(method: str) -> Cost:
    """Return the cost of a memory without its selection."""
    active = ACTIVE_CELLS.get(method, FFN)
    tables = 1 if method in OWN_KEYS else 2

    def params(keys: int, values: int) -> int:
        return (tables - 1) * keys * (WIDTH + 1) + values * WIDTH + WIDTH

    scored = CELLS if method == "vanilla_m" else active
    return Cost(params(CELLS, CELLS), params(scored, active), 2 * tables * active * WIDTH)


def always_active(params: int, flops: int) -> Cost:
    return Cost(params, params, flops)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_cost_by_hand(method, tied):
    """One layer is dense. The other one is sparse unless all are dense."""
    model = small_lm(method, **TIED[tied])
    sparse = method != "dense"
    ffn = always_active(2 * FFN * WIDTH + FFN + WIDTH, 2 * 2 * FFN * WIDTH)
    embeddings = TYPES * WIDTH * (1 if tied else 2)
    attention_flops = 2 * 4 * WIDTH * WIDTH + 2 * 2 * CONTEXT * WIDTH
    expected = {
        "attention": always_active(LAYERS * 4 * (WIDTH * WIDTH + WIDTH), LAYERS * attention_flops),
        "dense_ffn": ffn if sparse else ffn + ffn,
        "selection": always_active(*SELECTION[method]) if sparse else Cost(),
        "memory": memory_by_hand(method) if sparse else Cost(),
        "vocabulary": always_active(embeddings, 2 * TYPES * WIDTH),
        "other": always_active((2 * LAYERS + 1) * 2 * WIDTH, 0),
    }
    assert cost_by_part(model, CONTEXT) == expected
    assert model_cost(model, CONTEXT) == total(expected)
    assert total(expected).params == sum(parameter.numel() for parameter in model.parameters())
    assert dense_counterpart(model, CONTEXT) == cost_by_part(
        small_lm("dense", **TIED[tied]), CONTEXT
    )


@pytest.mark.parametrize("method", ["dense", "avgk", "vanilla_m", "pkm_ffn", "switch"])
def test_cost_of_gated_ffns(method):
    """Three maps of 64 units in place of two of 32, and three tables."""
    model = small_lm(method, sffn_glu="silu")
    parts = cost_by_part(model, CONTEXT)
    ffn = always_active(3 * 64 * WIDTH + 2 * 64 + WIDTH, 2 * 3 * 64 * WIDTH)
    assert parts["dense_ffn"] == (ffn + ffn if method == "dense" else ffn)
    if method != "dense":
        cells, active = 16 * 64, 64
        scored = cells if method == "vanilla_m" else active
        params = scored * (WIDTH + 1) + active * (2 * WIDTH + 1) + WIDTH
        whole = cells * (3 * WIDTH + 2) + WIDTH
        assert parts["memory"] == Cost(whole, params, 2 * 3 * active * WIDTH)
    assert total(parts).params == sum(parameter.numel() for parameter in model.parameters())
    dense = small_lm("dense", sffn_glu="silu")
    assert dense_counterpart(model, CONTEXT) == cost_by_part(dense, CONTEXT)


def test_cost_of_shared_blocks():
    """They are scored by nothing, and take part for every token."""
    plain = cost_by_part(small_lm("avgk"), CONTEXT)
    shared = cost_by_part(small_lm("avgk", sffn_shared_blocks=2), CONTEXT)
    assert shared["memory"] == plain["memory"]
    assert shared["selection"] == always_active(0, 2 * 62 * WIDTH)
    # PKM's shared cells have keys and biases of their own.
    pkm = small_lm("pkm", sffn_shared_blocks=4)
    parts = cost_by_part(pkm, CONTEXT)
    own = 4 * (WIDTH + 1)
    assert parts["memory"].params == CELLS * WIDTH + WIDTH + own
    assert parts["memory"].active_params == 16 * WIDTH + WIDTH + own
    assert parts["memory"].flops_per_token == 2 * (12 + 2 * 4) * WIDTH
    assert total(parts).params == sum(parameter.numel() for parameter in pkm.parameters())


def test_cost_of_layers_that_differ_is_the_sum():
    parts = cost_by_part(small_lm("mixed"), CONTEXT)
    methods = ("hash_layer", "avgk", "switch")
    assert parts["selection"] == sum((always_active(*SELECTION[m]) for m in methods), Cost())
    assert parts["memory"] == sum(map(memory_by_hand, methods), Cost())
    assert parts["dense_ffn"] == Cost()
    # The second layer has blocks, cells and parameters of its own.
    plan = "switch:0,avgk/block_size=4/expansion=2/active_blocks=3:1"
    parts = cost_by_part(small_lm("sffn", sffn_layers=plan), CONTEXT)
    cells, active = 2 * FFN, 12
    tables = cells * (2 * WIDTH + 1) + WIDTH
    used = active * (2 * WIDTH + 1) + WIDTH
    avgk = Cost(tables, used, 4 * active * WIDTH)
    assert parts["memory"] == memory_by_hand("switch") + avgk
    means = always_active(0, 2 * cells // 4 * WIDTH)
    assert parts["selection"] == always_active(*SELECTION["switch"]) + means


WITH_LOSSES = {"routing_losses": True}


@pytest.mark.parametrize("method", [*METHODS, "mixed"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, CONTEXT), {}),
        ((3, CONTEXT), {}),
        ((2, CONTEXT), UNEQUAL),
        ((2, CONTEXT), {"sffn_glu": "silu"}),
        ((2, CONTEXT), {"sffn_shared_blocks": 1, "sffn_active_blocks": 5}),
    ],
)
def test_flops_are_those_that_pytorch_counts(method, shape, options, monkeypatch):
    """Only plain matrix products of a forward pass are counted, as the counter knows neither fused
    attention on a CPU nor grouped products. Attention is counted over the whole square of
    ``CONTEXT`` positions without its causal mask, as is usual. The balance and z losses have
    products too, but are no part of the cost."""
    for loss in ("balance_loss", "entropy_loss", "z_loss"):
        monkeypatch.setattr(f"fairseq_sffn.memory.sparse_memory.{loss}", lambda *_: torch.zeros(()))
    if "sffn_glu" in options and method in OWN_KEYS:
        pytest.skip("has no gated cells")
    if "sffn_shared_blocks" in options:
        if method == "dense":
            pytest.skip("has no blocks")
        if method in ("hash_layer", "base"):
            options = {**options, "sffn_active_blocks": 2}
        if method == "mixed":
            options = {**options, "sffn_layers": PLAN.replace("layer", "layer/active_blocks=2")}
    engine, losses = ({}, {}) if method == "dense" else ({"sffn_engine": "loop"}, WITH_LOSSES)
    model = small_lm(method, **engine, **options).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(random_tokens(*shape), **losses)
    per_token = model_cost(model, CONTEXT).flops_per_token
    assert counter.get_total_flops() == shape[0] * CONTEXT * per_token


def test_maps_between_unequal_widths_are_other_and_not_recomputed():
    model = small_lm("avgk", **UNEQUAL, decoder_learned_pos=True, no_decoder_final_norm=True)
    other = cost_by_part(model, CONTEXT)["other"]
    positions = model.decoder.embed_positions.weight.numel()
    assert other.params == 8 * WIDTH + WIDTH * 24 + positions + 2 * LAYERS * 2 * WIDTH
    assert other.flops_per_token == 2 * (8 * WIDTH + WIDTH * 24)
    parts = cost_by_part(model, CONTEXT)
    once = total(parts).flops_per_token
    layers = once - other.flops_per_token - 2 * TYPES * 24
    assert cost.training_flops_per_token(parts) == 3 * once + layers


def test_mean_keys_take_an_addition_for_each_number_in_the_key_table():
    assert cost.mean_keys_flops(small_lm("avgk", sffn_freq=1)) == LAYERS * CELLS * WIDTH
    for method in ("dense", "switch", "vanilla_m", "rand_hash"):
        assert cost.mean_keys_flops(small_lm(method)) == 0


def test_cost_of_checkpointed_activations_is_the_same():
    costs = [model_cost(small_lm("avgk", checkpoint_activations=c), CONTEXT) for c in (True, False)]
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    "options",
    [dict(adaptive_input=True, adaptive_input_cutoff="8,14"), dict(adaptive_softmax_cutoff="8,14")],
)
def test_adaptive_embeddings_have_no_single_cost(options):
    model = small_lm("avgk", share_decoder_input_output_embed=False, **options)
    with pytest.raises(ValueError, match="adaptive"):
        model_cost(model, CONTEXT)


# The paper's numbers (Liu et al. 2023, section 4): dictionary 51200, context 2048


def paper(method: str, **options: Any) -> nn.Module:
    config = lm_config(f"transformer_lm_{method}_gpt3_medium", tokens_per_sample=2048, **options)
    with torch.device("meta"):
        return build(config, types=51200)


def figures(model: nn.Module) -> dict[str, Any]:
    return cost.cost_figures(model, 2048, tokens=60e9)


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    return figures(paper("dense"))


def test_training_the_dense_model_on_60_billion_tokens(dense):
    assert dense["params"] == dense["active_params"] == 354_740_224
    assert round(dense["train_zettaflops"], 4) == 0.2121
    layers, width, context, types = 24, 1024, 2048, 51200
    factor = 1 + context / (6 * width) + types / (16 * layers * width)
    by_formula = 96 * 60e9 * layers * width**2 * factor / 1e21
    assert dense["train_zettaflops"] == pytest.approx(by_formula, rel=1e-12)
    assert dense["selection_share"] == dense["overhead_vs_dense"] == 0


@pytest.mark.parametrize(
    ("block_size", "percent"), [(4096, 0.01), (1024, 0.06), (256, 0.24), (64, 0.95), (16, 3.8)]
)
def test_share_of_selection(dense, block_size, percent):
    avgk = figures(paper("avgk", sffn_block_size=block_size))
    within = 0.005 if percent < 1 else 0.05
    assert 100 * avgk["selection_share"] == pytest.approx(percent, abs=within)
    # The sparse model costs only this much more, and its parameters stay the same.
    assert avgk["overhead_vs_dense"] == avgk["selection_share"]
    more = avgk["train_zettaflops"] / dense["train_zettaflops"] - 1
    assert avgk["overhead_vs_dense"] == pytest.approx(more, rel=1e-9)
    assert avgk["params"] == 858_302_464
    assert avgk["active_params"] == dense["active_params"]
    assert avgk["mean_keys_flops_per_step"] == 4 * 65536 * 1024


def test_vanilla_m_scores_all_keys_but_reuses_the_active_ones():
    vanilla_m = figures(paper("vanilla_m"))
    assert round(100 * vanilla_m["overhead_vs_dense"], 1) == 56.9
    assert vanilla_m["selection_share"] == vanilla_m["overhead_vs_dense"]
    assert round(vanilla_m["train_zettaflops"], 3) == 0.333
    assert vanilla_m["params"] == 858_302_464


def test_a_switch_router_is_active(dense):
    switch = figures(paper("switch"))
    assert switch["params"] == 858_302_464 + 65_536
    assert switch["active_params"] == dense["active_params"] + 65_536


def test_hash_layers_cost_what_a_dense_model_costs(dense):
    hash_layer = figures(paper("hash_layer"))
    assert hash_layer["train_zettaflops"] == dense["train_zettaflops"]
    assert hash_layer["selection_share"] == hash_layer["overhead_vs_dense"] == 0
