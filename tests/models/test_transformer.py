"""The encoder-decoder model: sparse layers on both sides of fairseq's Transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.models.transformer import TransformerModel
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import Selector, SparseMemory
from fairseq_sffn.models.layer import SparseDecoderLayer, SparseEncoderLayer
from fairseq_sffn.models.transformer import SparseTransformer
from tests.models.small_lm import FFN, PAD, SMALL_BLOCKS, TYPES, WIDTH, dictionary, random_tokens

SELECTORS = sorted(Selector.registry)
BLOCKS = dict.fromkeys(SMALL_BLOCKS, 8)
"""Block sizes of selectors whose default is wider than the FFN."""


class Task:
    """The attributes that a model reads from a translation task."""

    def __init__(self, source: Dictionary, target: Dictionary) -> None:
        self.source_dictionary, self.target_dictionary = source, target


def config(name: str = "transformer_sffn", **options: Any) -> Any:
    sizes = dict(
        encoder_layers=2,
        decoder_layers=2,
        encoder_embed_dim=WIDTH,
        encoder_ffn_embed_dim=FFN,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        dropout=0.0,
    )
    structured = OmegaConf.structured(FairseqConfig)
    with open_dict(structured):
        structured.model = {"_name": name, **sizes, **options}
        add_defaults(structured)
    return structured.model


def build(selector: str = "avgk", source: int = TYPES, target: int = TYPES, **options: Any) -> Any:
    options.setdefault("sffn_block_size", BLOCKS.get(selector))
    task = Task(dictionary(source), dictionary(target))
    model = models.build_model(config(sffn_selector=selector, **options), task).double()
    return model


def padded(rows: list[Tensor], left: bool) -> Tensor:
    length = max(map(len, rows))
    sides = [(length - len(row), 0) if left else (0, length - len(row)) for row in rows]
    return torch.stack(
        [
            torch.nn.functional.pad(row, side, value=PAD)
            for row, side in zip(rows, sides, strict=True)
        ]
    )


def call(model: Any, source: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Any]]:
    losses = {"routing_losses": True} if isinstance(model, SparseTransformer) else {}
    torch.manual_seed(1)  # sigma_moe draws which blocks it leaves out
    return model(source, source.ne(PAD).sum(dim=1), target, **losses)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_sparse_layers_are_on_both_sides():
    model = build(encoder_layers=4, decoder_layers=6, sffn_freq=3)
    sparse = [
        [index for index, layer in enumerate(side.layers) if isinstance(layer, kind)]
        for side, kind in ((model.encoder, SparseEncoderLayer), (model.decoder, SparseDecoderLayer))
    ]
    assert sparse == [[2], [2, 5]]
    _, extra = call(model, random_tokens(2, 5), random_tokens(2, 4))
    assert list(extra["routing"]) == ["encoder_layer2", "decoder_layer2", "decoder_layer5"]
    assert extra["routing"]["encoder_layer2"].counts.sum() == 10 * 4
    assert extra["routing"]["decoder_layer5"].counts.sum() == 8 * 4


@pytest.mark.parametrize("normalize_before", [True, False])
def test_all_blocks_active_is_fairseqs_transformer(normalize_before):
    """Outputs and gradients agree for the same weights."""
    options = dict(
        encoder_normalize_before=normalize_before,
        decoder_normalize_before=normalize_before,
        share_decoder_input_output_embed=True,
        activation_fn="gelu",
    )
    sparse = build(sffn_expansion=1, **options)
    task = Task(dictionary(), dictionary())
    dense_args = config("transformer_avgk", **options)
    dense = TransformerModel.build_model(dense_args, task).double()
    state = sparse.state_dict()
    for name, tensor in dense.state_dict().items():
        memory = name.rpartition(".fc")[0] + ".fc1.memory"
        if f"{memory}.keys" in state:
            own = {"fc1.weight": "keys", "fc1.bias": "key_bias", "fc2.bias": "value_bias"}
            own["fc2.weight"] = "values"
            own_name = own[name[-len("fc1.weight") :] if name.endswith("weight") else name[-8:]]
            tensor = tensor.t() if own_name == "values" else tensor
            state[f"{memory}.{own_name}"] = tensor
        else:
            state[name] = tensor
    sparse.load_state_dict(state)
    source = padded([random_tokens(6), random_tokens(4)], left=True)
    target = padded([random_tokens(5), random_tokens(3)], left=False)
    ours, theirs = (call(model, source, target)[0] for model in (sparse, dense))
    close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for output in (ours, theirs):
        (output * cotangent).sum().backward()
    for side in ("encoder", "decoder"):
        gradient = getattr(sparse, side).layers[1].fc1.memory.values.grad.t()
        close(gradient, getattr(dense, side).layers[1].fc2.weight.grad)
        close(
            getattr(sparse, side).embed_tokens.weight.grad,
            getattr(dense, side).embed_tokens.weight.grad,
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("selector", "options"),
    [*((selector, {}) for selector in SELECTORS), ("hash_layer", {"hash_table": "bigram"})],
)
def test_padding_changes_nothing(selector, options, training):
    """A source is padded on the left and a target on the right, in a batch of one. Outputs and
    losses are those without padding."""
    model = build(selector, **options).train(training)
    source, target = random_tokens(1, 4), random_tokens(1, 3)
    output, extra = call(model, source, target)
    pad_source = torch.nn.functional.pad(source, (3, 0), value=PAD)
    pad_target = torch.nn.functional.pad(target, (0, 2), value=PAD)
    padded_output, padded_extra = call(model, pad_source, pad_target)
    close(padded_output[:, :3], output)
    for name, layer in extra["routing"].items():
        for ours, wanted in zip(padded_extra["routing"][name], layer, strict=True):
            close(ours, wanted)


@pytest.mark.parametrize("selector", SELECTORS)
def test_other_sentences_do_not_matter_in_evaluation(selector):
    model = build(selector).eval()
    sources, targets = [random_tokens(5), random_tokens(3)], [random_tokens(4), random_tokens(6)]
    together, _ = call(model, padded(sources, left=True), padded(targets, left=False))
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        alone, _ = call(model, source.unsqueeze(0), target.unsqueeze(0))
        close(together[row, : len(target)], alone[0])


@pytest.mark.parametrize("selector", SELECTORS)
def test_incremental_decoding_is_full_decoding(selector):
    model = build(selector).eval()
    source, target = padded([random_tokens(5), random_tokens(3)], left=True), random_tokens(2, 6)
    expected, _ = call(model, source, target)
    encoder_out = model.encoder(source, source.ne(PAD).sum(dim=1))
    order = torch.tensor([1, 0])
    encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
    state: dict[str, Any] = {}
    for end in range(1, 7):
        step, _ = model.decoder(target[order, :end], encoder_out, incremental_state=state)
        # fairseq takes the softmax of attention in fp32.
        close(step[:, 0], expected[order, end - 1], 1e-6)


@pytest.mark.parametrize("selector", ["avgk", "switch", "hash_layer", "pkm"])
def test_checkpointed_activations_change_no_gradient(selector):
    plain = build(selector)
    saving = build(selector, checkpoint_activations=True)
    saving.load_state_dict(plain.state_dict())
    source, target = random_tokens(2, 5), random_tokens(2, 4)
    for model in (plain, saving):
        output, extra = call(model, source, target)
        losses = sum(layer.balance_loss + layer.z_loss for layer in extra["routing"].values())
        (output.square().sum() + losses).backward()
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, name
            close(ours.grad, theirs.grad)


def test_each_side_has_its_own_width_and_dictionary():
    model = build(
        "hash_layer",
        source=12,
        target=17,
        decoder_embed_dim=24,
        decoder_ffn_embed_dim=48,
        sffn_expansion=4,
    )
    encoder, decoder = (m.config for m in model.modules() if isinstance(m, SparseMemory))
    assert (encoder.embed_dim, encoder.num_cells, encoder.vocab_size) == (WIDTH, 4 * FFN, 12)
    assert (decoder.embed_dim, decoder.num_cells, decoder.vocab_size) == (24, 4 * 48, 17)


def test_a_decoder_is_as_wide_as_its_encoder_by_default():
    decoder = build(encoder_embed_dim=24, encoder_ffn_embed_dim=64).decoder
    assert decoder.embed_dim == decoder.output_embed_dim == 24
    assert decoder.memory_configs["decoder_layer1"].num_cells == 16 * 64


def test_shared_embeddings_are_one_tensor():
    shared = dictionary()
    options = config("transformer_avgk", share_all_embeddings=True, sffn_block_size=8)
    model = models.build_model(options, Task(shared, shared))
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight


def test_merged_embeddings_are_as_in_fairseq():
    shared, saved = dictionary(), []
    for build_model in (models.build_model, TransformerModel.build_model):
        plain, merged = (
            build_model(
                config("transformer_avgk", sffn_block_size=8, merge_src_tgt_embed=merge),
                Task(shared, shared),
            )
            for merge in (False, True)
        )
        embedding = merged.encoder.embed_tokens.weight
        assert merged.decoder.embed_tokens.weight is embedding
        assert merged.decoder.output_projection.weight is embedding
        saved.append(sum(p.numel() for p in plain.parameters()))
        saved[-1] -= sum(p.numel() for p in merged.parameters())
    assert saved[0] == saved[1] > 0


def test_kept_layers_keep_their_kind():
    model = build(encoder_layers=4, decoder_layers=4, encoder_layers_to_keep="3,0")
    kinds = [isinstance(layer, SparseEncoderLayer) for layer in model.encoder.layers]
    assert kinds == [False, True] and len(model.decoder.layers) == 4
    _, extra = call(model, random_tokens(1, 3), random_tokens(1, 3))
    assert list(extra["routing"]) == ["encoder_layer3", "decoder_layer1", "decoder_layer3"]


def test_source_tokens_outside_the_dictionary_are_refused():
    model = build(source=12)
    with pytest.raises(UsageError, match="token id 15: outside the dictionary of 12 types"):
        call(model, torch.full((1, 2), 15), random_tokens(1, 2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(sffn_selector=None), "--sffn-selector: is required"),
        (dict(sffn_freq=3), "--sffn-freq 3: must be 1 to --encoder-layers 2"),
        (dict(encoder_layers=3, sffn_freq=3), "--sffn-freq 3: must be 1 to --decoder-layers 2"),
        (dict(encoder_layers_to_keep="0;1"), "--encoder-layers-to-keep 0;1: "),
        (dict(sffn_block_size=48), "--sffn-block-size 48: does not divide --encoder-ffn-embed-dim"),
        (
            dict(decoder_ffn_embed_dim=36, sffn_block_size=8),
            "--sffn-block-size 8: does not divide --decoder-ffn-embed-dim 36",
        ),
        (dict(quant_noise_pq=0.1), "--quant-noise-pq 0.1: "),
        (
            dict(sffn_selector="base", sffn_block_size=8),
            "--sffn-block-size 8: needs 4 active blocks, .* but base assigns one block",
        ),
    ],
)
def test_wrong_options(options, told):
    with pytest.raises(UsageError, match=told):
        models.build_model(
            config(**{"sffn_selector": "avgk", "sffn_block_size": 8, **options}),
            Task(dictionary(), dictionary()),
        )


def test_a_named_model_keeps_its_selector():
    with pytest.raises(UsageError, match="this model selects by avgk; use --arch transformer_sffn"):
        models.build_model(
            config("transformer_avgk", sffn_selector="switch"), Task(dictionary(), dictionary())
        )
