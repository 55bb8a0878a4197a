"""Models that are pickled, copied, saved whole, or sent to another process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from fairseq import models
from torch import Tensor, nn

from fairseq_sffn.models.plugin_model import PluginModel
from tests.models.small_lm import METHODS, SIZES, dictionary, random_tokens, small_lm
from tests.models.test_transformer import build as small_transformer

REGISTERED = sorted(
    name for name, model in models.MODEL_REGISTRY.items() if issubclass(model, PluginModel)
)


def stored(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": stored,
    "deepcopy": copy.deepcopy,
}


def lm_output(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return model(random_tokens(2, 8))[0]


def translation_output(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    source, target = random_tokens(2, 6), random_tokens(2, 5)
    return model(source, torch.tensor([6, 6]), target)[0]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    **{name: (lambda name=name: small_lm(name), lm_output) for name in METHODS},
    "gshard_8d": (lambda: small_lm("gshard_8d"), lm_output),
    "sffn": (
        lambda: small_lm("sffn", sffn_selector="switch", activation_fn="gelu"),
        lm_output,
    ),
    "mixed": (lambda: small_lm("mixed"), lm_output),
    "checkpointed": (lambda: small_lm("avgk", checkpoint_activations=True), lm_output),
    "balanced": (
        lambda: small_lm("avgk", avgk_center=True, sffn_balance_rate=0.1),
        lm_output,
    ),
    "bigram": (lambda: small_lm("hash_layer", hash_table="bigram"), lm_output),
    "translation": (lambda: small_transformer("avgk"), translation_output),
    "translation by switch": (
        lambda: small_transformer("switch"),
        translation_output,
    ),
}


def assert_equal(copied: nn.Module, model: nn.Module, output: Callable[[Any], Tensor]) -> None:
    assert type(copied) is type(model)
    assert {k: v.dtype for k, v in copied.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }
    theirs, ours = copy.deepcopy(copied), copy.deepcopy(model)  # training moves some buffers
    torch.testing.assert_close(output(theirs), output(ours), rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_copies_compute_the_same(case: str, way: str) -> None:
    build, output = CASES[case]
    model = build()
    assert_equal(WAYS[way](model), model, output)  # as built

    output(model).sum().backward()
    trained = WAYS[way](model)
    assert_equal(trained, model, output)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)

    model.eval()
    with torch.no_grad():
        output(model)  # from here on mean keys are cached
        evaluated = WAYS[way](model)
        assert_equal(evaluated, model, output)
        for parameter in evaluated.parameters():
            parameter.data.mul_(1.5)
        evaluated.eval()
        assert not torch.equal(output(evaluated), output(model))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["avgk", "switch", "checkpointed", "translation"])
def test_copies_between_a_pass_and_its_backward(case: str, way: str) -> None:
    build, output = CASES[case]
    model = build()
    pending = output(model)
    copied = WAYS[way](model)
    assert_equal(copied, model, output)
    pending.sum().backward()
    assert all(p.grad is None for p in copied.parameters())
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    output(copied).sum().backward()
    for ours, theirs in zip(gradients, copied.parameters(), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_decodes_on(way: str) -> None:
    """The copy comes in the middle of incremental decoding and includes its cache."""
    model = small_lm("avgk").eval()
    tokens, state = random_tokens(1, 6), {}
    with torch.no_grad():
        for length in range(1, 4):
            model(tokens[:, :length], incremental_state=state)
        copied, copied_state = WAYS[way](model), copy.deepcopy(state)
        mine = model(tokens[:, :4], incremental_state=state)[0]
        theirs = copied(tokens[:, :4], incremental_state=copied_state)[0]
    torch.testing.assert_close(theirs, mine, rtol=0, atol=0)


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_classes_and_their_options_pickle(name: str) -> None:
    model, options = models.MODEL_REGISTRY[name], models.MODEL_DATACLASS_REGISTRY[name]
    for found in (model, options, model.config_class):
        assert pickle.loads(pickle.dumps(found)) is found
    assert pickle.loads(pickle.dumps(options())) == options()


def test_all_sizes_are_registered() -> None:
    assert {f"transformer_lm_{name}{size}" for name in METHODS for size in SIZES} < set(REGISTERED)


def compute(model: nn.Module, tokens: Tensor, results: Any) -> None:
    """Run the spawned process."""
    with torch.no_grad():
        results.put(model(tokens)[0].numpy())


def test_a_spawned_process_gets_the_model() -> None:
    model, tokens = small_lm("avgk").eval(), random_tokens(2, 8)
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=compute, args=(model, tokens, results))
    process.start()
    theirs = torch.from_numpy(results.get())
    process.join()
    with torch.no_grad():
        torch.testing.assert_close(theirs, model(tokens)[0], rtol=0, atol=0)


def test_a_stored_model_needs_trust() -> None:
    """PyTorch refuses a pickled model unless the caller trusts the file."""
    file = io.BytesIO()
    torch.save(small_lm("avgk"), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file)


def test_dictionary_of_a_copy_is_the_same() -> None:
    copied = pickle.loads(pickle.dumps(small_lm("hash_layer")))
    assert copied.decoder.dictionary.symbols == dictionary().symbols
