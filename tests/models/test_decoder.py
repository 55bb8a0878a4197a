"""Whole models: what a token's output depends on, and what the decoder passes to its layers."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from fairseq import models
from fairseq.data import TruncatedDictionary
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import MemoryConfig, MemoryOutput, Selection, Selector, SparseMemory
from fairseq_sffn.models import stack
from fairseq_sffn.models.decoder import SparseTransformerDecoder
from fairseq_sffn.models.layer import SparseDecoderLayer
from fairseq_sffn.models.stack import trailing_tokens
from tests.models.small_lm import (
    METHODS,
    PAD,
    TYPES,
    WIDTH,
    dictionary,
    pad,
    random_tokens,
    small_config,
    small_lm,
)

SPARSE = [method for method in METHODS if method != "dense"]
# With an incremental state, fairseq computes attention's softmax in fp32.
FP32_SOFTMAX = dict(rtol=0, atol=1e-6)


def evaluated(method: str, **options: Any) -> nn.Module:
    """Build a model of three layers in evaluation mode. All are sparse unless the method is
    dense."""
    if method != "dense":
        options["sffn_freq"] = 1
    return small_lm(method, decoder_layers=3, **options).eval()


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return evaluated(request.param)


def close(actual: Tensor, expected: Tensor, rtol: float = 0, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# Evaluation: causality, neighbours, padding


def test_a_later_token_never_changes_an_earlier_output(model):
    batch = random_tokens(3, 8)
    output = model(batch)[0]
    for position in range(1, 8):
        other = batch.clone()
        other[:, position] = 4 + (batch[:, position] - 3) % (TYPES - 4)
        changed = model(other)[0]
        close(changed[:, :position], output[:, :position])
        assert (changed[:, position] - output[:, position]).abs().max() > 1e-3


def test_other_sentences_of_the_batch_do_not_matter(model):
    batch = random_tokens(6, 8)
    output = model(batch)[0]
    order = torch.randperm(6)
    close(model(batch[order])[0], output[order])
    for row in range(6):
        close(model(batch[row : row + 1])[0], output[row : row + 1])


def test_padding_on_the_right_changes_nothing(model):
    rows = [random_tokens(length) for length in (8, 5, 2)]
    batch = pad(rows, 11)
    output, extra = model(batch)
    alone = [model(row.unsqueeze(0)) for row in rows]
    for row, padded, (expected, _) in zip(rows, output, alone, strict=True):
        close(padded[: len(row)], expected[0])
    for number, routing in extra.get("routing", {}).items():
        single = [single_extra["routing"][number] for _, single_extra in alone]
        assert torch.equal(routing.counts, sum(layer.counts for layer in single))
        assert routing.counts.sum() == 15 * model.memory_config.active_blocks
        assert routing.dropped == 0


@pytest.mark.parametrize("method", SPARSE)
def test_padding_does_not_count_in_the_losses(method):
    model, row = evaluated(method), random_tokens(6)
    expected = model(row.unsqueeze(0), routing_losses=True)[1]["routing"]
    actual = model(pad([row], 9), routing_losses=True)[1]["routing"]
    for number, routing in expected.items():
        close(actual[number].balance_loss, routing.balance_loss)
        close(actual[number].z_loss, routing.z_loss)


# Incremental decoding


def step_by_step(model: nn.Module, batch: Tensor, state: dict, start: int = 0) -> Tensor:
    """Return the outputs from position ``start`` on, computed one token at a time."""
    steps = [
        model.decoder(batch[:, : end + 1], incremental_state=state)
        for end in range(start, batch.shape[1])
    ]
    for _, extra in steps:
        for routing in extra.get("routing", {}).values():
            assert routing.counts.sum() == len(batch) * model.memory_config.active_blocks
    return torch.cat([output for output, _ in steps], dim=1)


def test_incremental_decoding_is_full_decoding(model):
    batch = random_tokens(3, 8)
    close(step_by_step(model, batch, {}), model(batch)[0], **FP32_SOFTMAX)


def test_incremental_decoding_follows_reordered_beams(model):
    prefix, state = random_tokens(3, 4), {}
    step_by_step(model, prefix, state)
    order = torch.tensor([2, 0, 2])
    model.decoder.reorder_incremental_state_scripting(state, order)
    batch = torch.cat([prefix[order], random_tokens(3, 3)], dim=1)
    output = step_by_step(model, batch, state, start=4)
    close(output, model(batch)[0][:, 4:], **FP32_SOFTMAX)


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
    decoder = SparseTransformerDecoder(args, dictionary(), embeddings, memory_config, True)
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


@pytest.mark.parametrize("method", SPARSE)
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


@pytest.mark.parametrize("method", ["avgk", "vanilla_m"])
def test_checkpointed_layers_select_alike_under_autocast(method):
    """fairseq recomputes without autocast, which could change the block in near-ties."""
    model = small_lm(method, torch.float32, checkpoint_activations=True)
    chosen = []
    memory = model.decoder.layers[1].fc1.memory
    memory.register_forward_hook(lambda module, args, out: chosen.append(out.selection.blocks))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(random_tokens(40, 16))[0]
    output.float().square().sum().backward()
    first, again = chosen
    assert torch.equal(first, again)


def test_an_engine_that_cannot_compute_is_told_by_its_flag():
    model = small_lm("avgk", torch.bfloat16, sffn_engine="grouped", sffn_block_size=4)
    with pytest.raises(UsageError, match=r"^--sffn-engine grouped: cannot multiply"):
        model(random_tokens(2, 3))


@pytest.mark.parametrize("method", ["switch", "hash_layer"])
def test_skipped_layers_have_a_routing_of_zeros(method):
    model = small_lm(method, decoder_layers=4, sffn_freq=1, decoder_layerdrop=0.5)
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


# Passes


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_an_exception_leaves_nothing_behind(checkpoint_activations):
    model = evaluated("switch", checkpoint_activations=checkpoint_activations)
    batch = random_tokens(2, 4)
    expected = model(batch)[0]

    memory = [m for m in model.modules() if isinstance(m, SparseMemory)][1]
    working = memory.selector
    memory.selector = nn.Module()  # it has no forward
    with pytest.raises(NotImplementedError):
        model(batch)
    memory.selector = working
    close(model(batch)[0], expected)


class Watched(SparseMemory):
    """A memory that counts hooks while it runs."""

    model: nn.Module
    found: ClassVar[list[int]] = []

    def forward(self, *args: Any, **kwargs: Any) -> MemoryOutput:
        self.found.append(hooks(self.model))
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_no_hook_is_registered(checkpoint_activations, monkeypatch):
    monkeypatch.setattr(Watched, "found", [])
    model = small_lm("switch", checkpoint_activations=checkpoint_activations)
    memory = model.decoder.layers[1].fc1.memory
    memory.__class__ = Watched
    vars(memory)["model"] = model
    model(random_tokens(2, 4), routing_losses=True)[0].sum().backward()
    assert memory.found == [0] * (1 + checkpoint_activations)


def interleaved(model: nn.Module, batches: list[Tensor], **options: Any) -> list[Any]:
    """Run a pass of each batch in a separate thread. Every pass is inside the memory of every layer
    before any pass leaves it."""
    meeting = threading.Barrier(len(batches), timeout=10)

    def wait(*_: Any) -> None:
        meeting.wait()

    memories = [m for m in model.modules() if isinstance(m, SparseMemory)]
    handles = [m.register_forward_pre_hook(wait) for m in memories]
    handles += [m.register_forward_hook(wait) for m in memories]
    with ThreadPoolExecutor(len(batches)) as pool:
        results = list(pool.map(lambda batch: model(batch, **options), batches))
    for handle in handles:
        handle.remove()
    return results


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("method", ["avgk", "switch", "hash_layer"])
def test_interleaved_passes_do_not_mix(method, checkpoint_activations):
    options = dict(sffn_freq=1, checkpoint_activations=checkpoint_activations)
    model = small_lm(method, **options)
    batches = [random_tokens(2, 8), random_tokens(3, 5), random_tokens(4, 1)]
    batches[0][1, -3:] = PAD
    alone = [model(batch, routing_losses=True) for batch in batches]
    together = interleaved(model, batches, routing_losses=True)
    for (output, extra), (expected, expected_extra) in zip(together, alone, strict=True):
        assert torch.equal(output, expected)
        for name, layer in expected_extra["routing"].items():
            assert all(map(torch.equal, extra["routing"][name], layer))
    gradients = []
    for outputs in (together, alone):
        model.zero_grad()
        objective = 0.0
        for output, extra in reversed(outputs):
            losses = sum(layer.balance_loss + layer.z_loss for layer in extra["routing"].values())
            objective = objective + output.square().sum() + losses
        objective.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_one_pass_wants_losses_and_another_does_not():
    model = small_lm("switch", sffn_freq=1)
    batch = random_tokens(2, 8)
    plain = model(batch)[1]["routing"]
    wanted = model(batch, routing_losses=True)[1]["routing"]
    assert all(layer.balance_loss == layer.z_loss == 0 for layer in plain.values())
    assert all(layer.balance_loss > 0 and layer.z_loss > 0 for layer in wanted.values())


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_gradients_of_passes_before_one_backward_add_up(checkpoint_activations):
    """With --update-freq, a pass of other tokens comes between a pass and its backward."""
    model = small_lm("switch", sffn_freq=1, checkpoint_activations=checkpoint_activations)
    batches = [random_tokens(2, 8), random_tokens(3, 5)]

    def objective(batch: Tensor) -> Tensor:
        output, extra = model(batch, routing_losses=True)
        losses = sum(layer.balance_loss + layer.z_loss for layer in extra["routing"].values())
        return output.square().sum() + losses

    for batch in batches:
        objective(batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for loss in [objective(batch) for batch in batches]:
        loss.backward()
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        close(ours.grad, theirs)


class Wrapper(nn.Module):
    """Wraps a layer like fairscale's FSDP, which needs a GPU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_wrapped_layers_are_routed(checkpoint_activations, monkeypatch):
    options = dict(sffn_freq=1, checkpoint_activations=checkpoint_activations)
    model, batch = small_lm("switch", **options), random_tokens(2, 8)
    monkeypatch.setattr(stack, "fsdp_wrap", lambda layer, min_num_params: Wrapper(layer))
    wrapped = small_lm("switch", **options)
    state = model.state_dict()
    names = {re.sub(r"(layers\.\d+)", r"\1.layer", name): name for name in state}
    wrapped.load_state_dict({new: state[old] for new, old in names.items()})
    for each in (model, wrapped):
        output, extra = each(batch, routing_losses=True)
        losses = sum(layer.balance_loss + layer.z_loss for layer in extra["routing"].values())
        (output.square().sum() + losses).backward()
        assert list(extra["routing"]) == ["layer0", "layer1"]
        assert all(layer.counts.sum() == 16 for layer in extra["routing"].values())
    for ours, theirs in zip(wrapped.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("method", ["dense", "switch"])
def test_tokens_that_stand_for_none_count_nowhere(method):
    """In training on several processes, a process without sentences runs such tokens."""
    model = small_lm(method).train()
    batch = random_tokens(2, 8)
    outputs, extra = model(batch, routing_losses=True)
    dummies, dummies_extra = model(batch, routing_losses=True, is_dummy=True)
    assert torch.equal(dummies, outputs)
    for name, layer in extra.get("routing", {}).items():
        assert layer.counts.sum() == 16 and layer.balance_loss > 0
        dummy = dummies_extra["routing"][name]
        assert dummy.counts.sum() == dummy.balance_loss == dummy.z_loss == 0
    assert ("routing" in extra) == (method != "dense")
