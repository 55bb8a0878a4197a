"""Parameters and FLOPs, by hand, by PyTorch's counter, and as the paper has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.small_lm import FFN, METHODS, TYPES, WIDTH, build, lm_config, random_tokens, small_lm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq_sffn.tools.cost import Cost, model_cost

LAYERS, BLOCKS, EXPANSION = 2, {"avgk": 64, "switch": 16, "hash_layer": 16}, 16
CONTEXT = 12


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_cost_by_hand(method, tied):
    """One dense layer; another that is sparse unless all are dense."""
    model = small_lm(method, share_decoder_input_output_embed=tied)
    attention = 4 * (WIDTH * WIDTH + WIDTH)
    norms = 2 * 2 * WIDTH
    dense_ffn = 2 * FFN * WIDTH + FFN + WIDTH
    embeddings = TYPES * WIDTH * (1 if tied else 2)
    dense = embeddings + LAYERS * (attention + norms + dense_ffn) + 2 * WIDTH
    idle = 0 if method == "dense" else (EXPANSION - 1) * (2 * FFN * WIDTH + FFN)
    router = 16 * WIDTH if method == "switch" else 0

    layer_flops = 2 * 4 * WIDTH * WIDTH + 2 * 2 * CONTEXT * WIDTH + 2 * 2 * FFN * WIDTH
    selection = 2 * BLOCKS[method] * WIDTH if method in ("avgk", "switch") else 0
    flops = LAYERS * layer_flops + selection + 2 * TYPES * WIDTH
    expected = Cost(dense + idle + router, dense + router, flops)
    assert model_cost(model, CONTEXT) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, CONTEXT), (3, CONTEXT)])
def test_flops_are_those_that_pytorch_counts(method, shape):
    """The matrix products of a forward pass, as plain ones: the counter knows neither fused
    attention on a CPU nor grouped products. Attention is counted over the whole square of
    ``CONTEXT`` positions, its causal mask left out, as is usual. Means over tokens for the balance
    and z losses, which are products too, are no part of the cost."""
    options = {} if method == "dense" else {"sffn_engine": "loop"}
    model = small_lm(method, **options).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(random_tokens(*shape))
    losses = 2 * (BLOCKS[method] + 1) if method in ("avgk", "switch") else 0
    per_token = model_cost(model, CONTEXT).flops_per_token + losses
    assert counter.get_total_flops() == shape[0] * CONTEXT * per_token


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


def training_flops(model: nn.Module) -> int:
    """Of a token: forward and backward, and once more forward of the layers, whose activations are
    recomputed (Narayanan et al. 2021)."""
    vocabulary = 2 * model.decoder.output_projection.weight.numel()
    return 4 * (model_cost(model, 2048).flops_per_token - vocabulary) + 3 * vocabulary


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return paper("dense")


def test_training_the_dense_model_on_60_billion_tokens(dense):
    assert model_cost(dense, 2048).params == 354_740_224
    assert model_cost(dense, 2048).active_params == 354_740_224
    assert round(60e9 * training_flops(dense) / 1e21, 4) == 0.2121
    layers, width, context, types = 24, 1024, 2048, 51200
    factor = 1 + context / (6 * width) + types / (16 * layers * width)
    assert training_flops(dense) == pytest.approx(96 * layers * width**2 * factor, rel=1e-12)


@pytest.mark.parametrize(
    ("block_size", "percent"), [(4096, 0.01), (1024, 0.06), (256, 0.24), (64, 0.95), (16, 3.8)]
)
def test_share_of_selection(dense, block_size, percent):
    model = paper("avgk", sffn_block_size=block_size)
    selection = 4 * model.memory_config.selection_flops_per_token()  # in 4 of 24 layers
    share = 100 * 4 * selection / training_flops(dense)
    assert share == pytest.approx(percent, abs=0.005 if percent < 1 else 0.05)
    # Which is all that the sparse model costs more, and its parameters stay the same.
    assert training_flops(model) - training_flops(dense) == 4 * selection
    assert model_cost(model, 2048).params == 858_302_464
    assert model_cost(model, 2048).active_params == model_cost(dense, 2048).active_params


def test_a_switch_router_is_active(dense):
    cost = model_cost(paper("switch"), 2048)
    assert cost.params == 858_302_464 + 65_536
    assert cost.active_params == model_cost(dense, 2048).active_params + 65_536
