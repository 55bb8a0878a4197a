"""Which layers are sparse, and the token ids that they get."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fairseq import models
from fairseq.data import TruncatedDictionary
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import MemoryConfig, Selection, Selector
from fairseq_sffn.models import stack
from fairseq_sffn.models.decoder import SparseTransformerDecoder
from fairseq_sffn.models.layer import SparseDecoderLayer
from fairseq_sffn.models.stack import trailing_tokens
from tests.memory.cases import close
from tests.models.small_lm import (
    PAD,
    SPARSE,
    TYPES,
    WIDTH,
    dictionary,
    evaluated,
    pad,
    random_tokens,
    small_config,
    small_lm,
)

# Token ids


@pytest.mark.parametrize("context", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (0, 3), (3, 0)])
def test_trailing_tokens(shape, context):
    batch, length = shape
    tokens = random_tokens(*shape)
    actual = trailing_tokens(tokens, context, PAD)
    assert actual.shape == (batch, length, context)
    for row in range(batch):
        for end in range(length):
            expected = [
                tokens[row, position].item() if position >= 0 else PAD
                for position in range(end - context + 1, end + 1)
            ]
            assert actual[row, end].tolist() == expected


@pytest.fixture
def seen() -> Iterator[list[Tensor]]:
    """Register a selector ``stub``, and record the token ids that it gets, each (N, 2)."""
    given: list[Tensor] = []

    class Stub(Selector):
        name = "stub"
        scores_blocks = False

        @classmethod
        def context_tokens(cls, config):
            return 2

        def forward(self, inputs):
            given.append(inputs.token_ids)
            return Selection(torch.zeros(len(inputs.x), 1, dtype=torch.int64))

    yield given
    del Selector.registry["stub"]


def stub_decoder() -> SparseTransformerDecoder:
    memory_config = MemoryConfig(WIDTH, 32, 8, 1, selector="stub", vocab_size=TYPES)
    args = small_config("avgk", max_target_positions=16)
    embeddings = nn.Embedding(TYPES, WIDTH, PAD)
    decoder = SparseTransformerDecoder(args, dictionary(), embeddings, {1: memory_config}, True)
    return decoder.eval()


def pairs(batch: Tensor) -> list[list[tuple[int, int]]]:
    """Return, for each position and sentence, the token before it and the token."""
    rows = [[PAD, *row] for row in batch.tolist()]
    return [[(row[t], row[t + 1]) for row in rows] for t in range(batch.shape[1])]


def test_a_selector_sees_its_context_time_first(seen):
    batch = pad([random_tokens(5), random_tokens(3)])
    stub_decoder()(batch)
    (ids,) = seen
    assert ids.view(5, 2, 2).tolist() == [list(map(list, step)) for step in pairs(batch)]


def test_a_selector_sees_its_context_in_incremental_decoding(seen):
    batch, decoder, state = random_tokens(3, 5), stub_decoder(), {}
    for end in range(1, 6):
        decoder(batch[:, :end], incremental_state=state)
    assert [ids.tolist() for ids in seen] == [list(map(list, step)) for step in pairs(batch)]


@pytest.mark.parametrize("method", [*SPARSE, "mixed"])
def test_token_ids_outside_the_dictionary_are_refused(method):
    batch = random_tokens(2, 4)
    batch[1, 2] = TYPES
    with pytest.raises(UsageError, match=f"token id {TYPES}: .* dictionary of {TYPES} types") as e:
        evaluated(method)(batch)
    assert "\n" not in str(e.value)


def test_a_shorter_output_dictionary_leaves_the_input_alone():
    shorter = TruncatedDictionary(dictionary(), 10)
    task = LanguageModelingTask(OmegaConf.create({}), dictionary(), shorter)
    config = small_config("avgk", share_decoder_input_output_embed=False)
    model = models.build_model(config, task)
    assert model(torch.tensor([[TYPES - 1]]))[0].shape == (1, 1, len(shorter))
    with pytest.raises(UsageError, match=f"token id {TYPES}: "):
        model(torch.tensor([[TYPES]]))


# Which layers are sparse


@pytest.mark.parametrize(
    ("layers", "freq", "kept", "sparse"),
    [
        (4, 2, None, {1: 1, 3: 3}),
        (4, 1, None, {0: 0, 1: 1, 2: 2, 3: 3}),
        (6, 3, None, {2: 2, 5: 5}),
        (5, 4, None, {3: 3}),
        (4, 2, "1,2,3", {1: 0, 3: 2}),
        (4, 2, "3,2,1", {1: 0, 3: 2}),
        (4, 2, "0,2", {}),
        (6, 3, "4,5", {5: 1}),
    ],
)
def test_layer_numbers(layers, freq, kept, sparse):
    """``sparse`` maps the number in training to the index in the model."""
    model = small_lm("switch", decoder_layers=layers, sffn_freq=freq, decoder_layers_to_keep=kept)
    built = model.decoder.layers
    assert len(built) == (len(kept.split(",")) if kept else layers)
    indices = [i for i, layer in enumerate(built) if isinstance(layer, SparseDecoderLayer)]
    assert indices == list(sparse.values())
    assert list(model(random_tokens(2, 3))[1]["routing"]) == [f"layer{number}" for number in sparse]


def test_a_pruned_model_takes_the_kept_layers_of_a_checkpoint():
    whole = small_lm("hash_layer", decoder_layers=4).eval()
    config = small_config("hash_layer", decoder_layers=4, decoder_layers_to_keep="1,3")
    pruned = small_lm("hash_layer", decoder_layers=4, decoder_layers_to_keep="1,3").eval()
    pruned.load_state_dict(whole.state_dict(), model_cfg=config)
    batch = random_tokens(2, 5)
    actual, extra = pruned(batch)
    whole.decoder.layers = nn.ModuleList([whole.decoder.layers[1], whole.decoder.layers[3]])
    whole.decoder.sparse_layers = {0: "layer1", 1: "layer3"}
    close(actual, whole(batch)[0])
    assert list(extra["routing"]) == ["layer1", "layer3"]


def test_an_engine_that_cannot_compute_is_told_by_its_flag():
    model = small_lm("avgk", torch.bfloat16, sffn_engine="grouped", sffn_block_size=4)
    with pytest.raises(UsageError, match=r"^--sffn-engine grouped: cannot multiply"):
        model(random_tokens(2, 3))


SHARED = dict(sffn_active_blocks=2, sffn_shared_blocks=1, sffn_expansion=17)


@pytest.mark.parametrize(
    ("method", "options"), [("switch", {}), ("hash_layer", {}), ("switch", SHARED)]
)
def test_skipped_layers_have_a_routing_of_zeros(method, options):
    model = small_lm(method, decoder_layers=4, sffn_freq=1, decoder_layerdrop=0.5, **options)
    ran: set[int] = set()
    for number in range(4):  # iterating over the layers drops some
        ffn = model.decoder.layers[number].fc1
        ffn.register_forward_hook(lambda *_, number=number: ran.add(number))
    patterns = set()
    for _ in range(20):
        ran.clear()
        routing = model(random_tokens(2, 3), routing_losses=True)[1]["routing"]
        assert list(routing) == [f"layer{number}" for number in range(4)]
        for number, layer in enumerate(routing.values()):
            assert layer.counts.shape == (16,)
            assert layer.counts.sum() == (6 if number in ran else 0)
            if number not in ran:
                assert layer.balance_loss == layer.z_loss == layer.dropped == 0
        patterns.add(len(ran))
    assert len(patterns) > 2
    model.eval()
    assert all(layer.counts.any() for layer in model(random_tokens(2, 3))[1]["routing"].values())


def test_a_model_without_any_layer_left_still_trains():
    model = small_lm("switch", decoder_layerdrop=1.0)
    output, extra = model(random_tokens(2, 3), routing_losses=True)
    (output.sum() + extra["routing"]["layer1"].balance_loss).backward()
    assert model.decoder.embed_tokens.weight.grad.any()


class Wrapper(nn.Module):
    """Wraps a layer like fairscale's FSDP, which needs a GPU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize(
    ("method", "options", "active_blocks"),
    [("switch", dict(sffn_freq=1), [1, 1]), ("mixed", {}, [1, 4, 1])],
)
def test_wrapped_layers_are_routed(
    method, options, active_blocks, checkpoint_activations, monkeypatch
):
    options = dict(checkpoint_activations=checkpoint_activations, **options)
    model, batch = small_lm(method, **options), random_tokens(2, 8)
    monkeypatch.setattr(stack, "fsdp_wrap", lambda layer, min_num_params: Wrapper(layer))
    wrapped = small_lm(method, **options)
    state = model.state_dict()
    names = {re.sub(r"(layers\.\d+)", r"\1.layer", name): name for name in state}
    wrapped.load_state_dict({new: state[old] for new, old in names.items()})
    for each in (model, wrapped):
        output, extra = each(batch, routing_losses=True)
        losses = sum(layer.balance_loss + layer.z_loss for layer in extra["routing"].values())
        (output.square().sum() + losses).backward()
        used = {f"layer{number}": 16 * active for number, active in enumerate(active_blocks)}
        assert {name: layer.counts.sum() for name, layer in extra["routing"].items()} == used
    for ours, theirs in zip(wrapped.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
