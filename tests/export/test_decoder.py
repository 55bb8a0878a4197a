"""The plain decoder, against fairseq's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_sffn.errors import UsageError
from fairseq_sffn.export.decoder import Decoder
from fairseq_sffn.export.description import UNSUPPORTED, check_exportable, describe
from tests.export.exported import PlainCache, pair
from tests.models.small_lm import METHODS, PAD, build, pad, random_tokens, small_config

EXACT = dict(rtol=1e-10, atol=1e-10)
LENGTHS = (7, 3, 1)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "post_norm": ("avgk", dict(decoder_normalize_before=False)),
    "no_final_norm": ("avgk", dict(no_decoder_final_norm=True)),
    "learned_positions": ("switch", dict(decoder_learned_pos=True)),
    "no_positions": ("avgk", dict(no_token_positional_embeddings=True)),
    "norm_and_scale_of_embedding": (
        "dense",
        dict(layernorm_embedding=True, no_scale_embedding=True),
    ),
    "untied": ("hash_layer", dict(share_decoder_input_output_embed=False)),
    "odd_width": ("dense", dict(decoder_embed_dim=15, decoder_attention_heads=3)),
    "other_widths": (
        "avgk",
        dict(share_decoder_input_output_embed=False, decoder_input_dim=12, decoder_output_dim=20),
    ),
    "normformer": ("avgk", dict(scale_attn=True, scale_heads=True, scale_resids=True)),
    "normformer_dense": ("dense", dict(scale_fc=True)),
    "gelu": ("avgk", dict(activation_fn="gelu")),
    "gelu_accurate": ("avgk", dict(activation_fn="gelu_accurate", sffn_freq=2)),
    "tanh": ("avgk", dict(activation_fn="tanh", sffn_freq=2)),
    "linear": ("avgk", dict(activation_fn="linear", sffn_freq=2)),
    "gated": ("switch", dict(sffn_glu="silu", sffn_glu_width=24, sffn_freq=2)),
    "gated_dense": ("dense", dict(sffn_glu="gelu", sffn_glu_width=24)),
    "shared_blocks": ("avgk", dict(sffn_shared_blocks=1)),
    "centred": ("avgk", dict(avgk_center=True)),
    "balanced": ("switch", dict(sffn_balance_rate=0.01)),
    "value_rate": ("avgk", dict(sffn_value_lr_scale=4.0)),
    "gate_and_scale": ("moe", dict(sffn_gate="sigmoid", sffn_route_scale=2.5)),
    "bigram": ("hash_layer", dict(hash_table="bigram")),
    "balanced_table": ("hash_layer", dict(hash_table="balanced")),
    "some_layers": ("avgk", dict(decoder_layers_to_keep="0,2", sffn_freq=3)),
}


def left_pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Make a batch padded on the left, by an id that is no padding, and its mask."""
    length = max(map(len, rows))
    ids = [torch.nn.functional.pad(row, (length - len(row), 0), value=5) for row in rows]
    mask = [(torch.arange(length) >= length - len(row)).long() for row in rows]
    return torch.stack(ids), torch.stack(mask)


def logits(decoder: Decoder, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return decoder.logits(decoder(ids, *args, **kwargs).features)


def check_all_passes(model: Any, decoder: Decoder) -> None:
    """Compare full passes, both paddings and incremental decoding with fairseq's full pass."""
    rows = [random_tokens(length) for length in LENGTHS]
    padded = pad(rows)
    with torch.no_grad():
        expected = model(padded)[0]
        right = logits(decoder, padded)
        right_mask = logits(decoder, padded.where(padded != PAD, 7), padded.ne(PAD).long())
        ids, mask = left_pad(rows)
        left = logits(decoder, ids, mask)
        cache, steps = PlainCache(), []
        for begin, end in ((0, 4), (4, 6), (6, 7)):
            before = ids[:, :begin]
            steps.append(
                logits(decoder, ids[:, begin:end], mask[:, :end], cache=cache, context_ids=before)
            )
    incremental = torch.cat(steps, dim=1)
    for i, length in enumerate(LENGTHS):
        wanted = expected[i, :length]
        torch.testing.assert_close(right[i, :length], wanted, **EXACT)
        torch.testing.assert_close(right_mask[i, :length], wanted, **EXACT)
        torch.testing.assert_close(left[i, -length:], wanted, **EXACT)
        torch.testing.assert_close(incremental[i, -length:], wanted, **EXACT)
    assert left.isfinite().all()  # also at padding


@pytest.mark.parametrize("method", [*METHODS, "mixed"])
def test_methods(method: str) -> None:
    check_all_passes(*pair(method))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    method, options = OPTIONS[name]
    check_all_passes(*pair(method, **options))


def test_fp32() -> None:
    model, decoder = pair("avgk", torch.float32)
    ids = random_tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(logits(decoder, ids), model(ids)[0], rtol=0, atol=1e-5)


def test_gradients() -> None:
    model, decoder = pair("switch")
    ids = random_tokens(2, 9)
    model(ids)[0].square().sum().backward()
    logits(decoder, ids).square().sum().backward()
    expected = {name.removeprefix("decoder."): p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in decoder.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)


def test_losses_of_memories() -> None:
    model, decoder = pair("switch")
    ids = pad([random_tokens(6), random_tokens(4)])
    routing = model(ids, routing_losses=True)[1]["routing"]
    memories = decoder(ids, losses=True).memories
    assert [f"layer{number}" for number in memories] == list(routing)
    for number, found in memories.items():
        expected = routing[f"layer{number}"]
        torch.testing.assert_close(found.balance_loss, expected.balance_loss, **EXACT)
        torch.testing.assert_close(found.z_loss, expected.z_loss, **EXACT)
        assert torch.equal(found.usage.counts, expected.counts)


def test_layerdrop_skips_layers_in_training() -> None:
    _, decoder = pair("avgk", decoder_layerdrop=0.5)
    ids = random_tokens(1, 4)
    ran = [tuple(decoder.train()(ids).memories) for _ in range(20)]
    assert len(set(ran)) > 3
    assert tuple(decoder.eval()(ids).memories) == (0, 1, 2)


def test_positions_given() -> None:
    _, decoder = pair("avgk")
    ids = random_tokens(2, 5)
    shifted = decoder(ids, position_ids=torch.arange(5).expand(2, 5) + 3).features
    torch.testing.assert_close(
        decoder(ids, position_ids=torch.arange(5).expand(2, 5)).features, decoder(ids).features
    )
    assert not torch.allclose(shifted, decoder(ids).features)


def test_wrong_inputs() -> None:
    _, decoder = pair("hash_layer", hash_table="bigram")
    ids, cache = random_tokens(1, 4), PlainCache()
    with pytest.raises(
        ValueError, match=r"attention_mask of shape \(1, 3\) .* \(1, 4\), for 0 past"
    ):
        decoder(ids, torch.ones(1, 3))
    decoder(ids, cache=cache)
    with pytest.raises(ValueError, match="context_ids: a layer selects by the last 2 token ids"):
        decoder(ids[:, :1], cache=cache)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options(name: str) -> None:
    config = small_config("dense")
    value = True if name in ("adaptive_input", "character_embeddings") else "4"
    config[name] = value if name not in ("quant_noise_pq", "quant_noise_scalar") else 0.5
    flag = "--" + name.replace("_", "-")
    with pytest.raises(
        UsageError, match=rf"^{flag}[^\n]*: fairseq-sffn export does not support \w[^\n]*$"
    ):
        check_exportable(config)


def test_other_activation() -> None:
    config = small_config("dense")
    check_exportable(config)
    options = type("Options", (), {**config, "activation_fn": "swish"})
    with pytest.raises(
        UsageError, match=r"--activation-fn swish: fairseq-sffn export supports relu"
    ):
        check_exportable(options)


def test_fewer_outputs() -> None:
    config = small_config("dense", share_decoder_input_output_embed=False)
    model = build(config)
    model.decoder.output_projection = torch.nn.Linear(16, 10, bias=False)
    with pytest.raises(UsageError, match=r"--output-dictionary-size 10: .* 20 types"):
        describe(model, type(model).options(config))
