"""A memory as a module: copies, checkpoints, costs, initialisation and refused inputs."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fairseq_sffn.memory import ConfigError, Scores, Selection
from tests.memory.cases import (
    CASES,
    build,
    close,
    tokens,
)


@pytest.mark.parametrize("case", CASES)
def test_a_restored_memory_is_the_same(case):
    memory, other = build(case), build(case)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for training in (True, False):
        x, token_ids = tokens(4, 5)
        outs = []
        for module in (memory, other):
            torch.manual_seed(1)
            outs.append(module.train(training)(x, token_ids))
        assert torch.equal(outs[0].output, outs[1].output)
        assert torch.equal(outs[0].selection.blocks, outs[1].selection.blocks)


@pytest.mark.parametrize("case", CASES)
def test_copies_and_pickles_are_the_same(case):
    memory, (x, token_ids) = build(case).eval(), tokens(5)
    output = memory(x, token_ids).output
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert torch.equal(other(x, token_ids).output, output)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_inference_mode(case, training):
    memory, (x, token_ids) = build(case).train(training), tokens(5)
    torch.manual_seed(1)
    output = memory(x, token_ids).output
    torch.manual_seed(1)
    with torch.inference_mode():
        close(memory(x, token_ids).output, output)


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_torch(case):
    memory, (x, token_ids) = build(case, engine="loop", gate="softmax"), tokens(16)
    counted, statistics = (FlopCounterMode(display=False) for _ in range(2))
    with torch.no_grad():
        with counted:
            selection = memory(x, token_ids).selection
        with statistics:  # the balance loss of product keys is a matrix product
            if selection.scores is not None:
                selection.scores.mean_shares(None)[0]
    wanted = 16 * memory.config.flops_per_token()
    if case == "gshard-sampled":  # the config counts second blocks as used
        wanted -= int((~selection.kept).sum()) * 4 * memory.config.block_size * 8
    assert counted.get_total_flops() - statistics.get_total_flops() == wanted


def test_flops_of_the_backward_pass_are_twice_the_forward():
    memory, (x, _) = build("avgk-g4", engine="loop"), tokens(16)
    out = memory(x.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        out.output.sum().backward()
    assert counter.get_total_flops() == 2 * 16 * 4 * memory.config.active_cells * 8


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("gate", "score_tables"), [("none", 2), ("softmax", 3)])
def test_kept_for_backward_is_what_a_dense_ffn_keeps(gate, score_tables, activation):
    """The losses keep scores and probabilities (N, B). The rest is what the dense FFN keeps, and an
    index."""
    num_tokens, width, assignments, active = 256, 64, 256 * 4, 4 * 64
    memory = build(
        "avgk-g4",
        torch.float32,
        embed_dim=width,
        num_cells=1024,
        block_size=64,
        active_blocks=4,
        gate=gate,
        activation=activation,
    )
    function = nn.ReLU() if activation == "relu" else nn.GELU()
    dense = nn.Sequential(nn.Linear(width, active), function, nn.Linear(active, width))
    x = torch.randn(num_tokens, width, requires_grad=True)

    dense_bytes = _bytes_kept(lambda: dense(x), dense)
    hidden_tables = 1 if activation == "relu" else 2
    assert dense_bytes == 4 * num_tokens * (width + hidden_tables * active)
    scores = score_tables * 4 * num_tokens * memory.config.num_blocks
    plan = 4 * assignments  # the tokens, which the hooks do not see
    assert _bytes_kept(lambda: memory(x), memory) + plan - scores <= 1.15 * dense_bytes


def _bytes_kept(call, module) -> int:
    """Count the bytes of the distinct storages saved for backward that are no parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        # A reference keeps addresses from being used again.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result is not None
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in parameters)


def test_dropout_acts_on_the_activations_in_training_only():
    memory, (x, _) = build(activation_dropout=0.5), tokens(8)
    plain = memory.eval()(x).output
    assert not torch.allclose(memory.train()(x).output, plain)
    close(memory.eval()(x).output, plain, tolerance=1e-12)

    class Twice(nn.Module):
        def forward(self, hidden):
            return 2 * hidden

    memory.dropout = Twice()
    bias = memory.value_bias
    close(memory(x).output - bias, 2 * (plain - bias), tolerance=1e-12)


@pytest.mark.parametrize("init_scale", [1.0, 0.5])
@pytest.mark.parametrize("num_cells", [1024, 4096])
def test_initial_tables_are_those_of_a_dense_ffn_of_the_active_size(num_cells, init_scale):
    memory = build(
        embed_dim=64, num_cells=num_cells, block_size=64, active_blocks=4, init_scale=init_scale
    )
    dense = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    pairs = [(memory.keys, dense[0].weight), (memory.key_bias, dense[0].bias)]
    pairs += [(memory.values, dense[1].weight), (memory.value_bias, dense[1].bias)]
    for ours, theirs in pairs:
        torch.testing.assert_close(
            ours.abs().max().float(), init_scale * theirs.abs().max(), rtol=0.1, atol=0
        )
        spread = ours.std() / init_scale
        torch.testing.assert_close(spread.float(), theirs.std(), rtol=0.15, atol=0)


def test_an_engine_that_cannot_is_refused():
    with pytest.raises(ConfigError, match=r"engine grouped: .*float64.* 4 x 8") as caught:
        build(engine="grouped")(tokens(2)[0])
    assert "\n" not in str(caught.value)


def test_parameters_are_registered_once():
    names = [name for name, _ in build().named_parameters(remove_duplicate=False)]
    assert names == ["keys", "key_bias", "values", "value_bias"]


def test_repr_tells_the_method():
    assert "cells=32, blocks=8 x 4, active=4, selector=avgk, gate=none" in repr(build())


@pytest.mark.parametrize(
    "call",
    [
        lambda memory: memory(tokens(4)[0], tokens(3)[1]),
        lambda memory: memory(tokens(2, 3)[0], tokens(3, 2)[1]),
        lambda memory: memory(tokens(4)[0], tokens(4)[1].float()),
        lambda memory: memory(tokens(4)[0], tokens(4)[1].bool()),
    ],
    ids=["too few", "transposed", "float", "bool"],
)
@pytest.mark.parametrize("case", CASES)
def test_token_ids_that_do_not_fit_are_refused(case, call):
    with pytest.raises(ValueError, match=r"token_ids of") as caught:
        call(build(case))
    assert "\n" not in str(caught.value)


def test_missing_token_ids_are_refused():
    with pytest.raises(ValueError, match="hash_layer selects by token ids: give them"):
        build("hash_layer")(tokens(4)[0])


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (16,)])
def test_x_of_another_width_is_refused(shape):
    with pytest.raises(ValueError):
        build()(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1)])
def test_a_padding_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError):
        build()(tokens(2, 3)[0], padding_mask=torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("case", ["avgk-g4", "pkm", "pkm_ffn"])
def test_a_learning_rate_scale_of_the_values_is_that_of_adams_steps(case):
    plain, scaled = build(case), build(case, value_lr_scale=4.0)
    state = {**plain.state_dict(), "values": plain.values / 4, "value_lr_scale": torch.tensor(4.0)}
    scaled.load_state_dict(state)
    (x, token_ids), before = tokens(8), plain.values.detach().clone()
    close(scaled(x, token_ids).output, plain(x, token_ids).output, tolerance=1e-12)
    for memory, lr in ((plain, 4e-3), (scaled, 1e-3)):
        (memory(x, token_ids).output ** 2).sum().backward()
        torch.optim.Adam([memory.values], lr=lr, eps=1e-30).step()
    assert not torch.equal(plain.values, before)
    close(scaled.values * 4, plain.values)


def test_initial_values_do_not_depend_on_their_learning_rate():
    torch.manual_seed(3)
    plain = build()
    torch.manual_seed(3)
    close(build(value_lr_scale=4.0).values * 4, plain.values, tolerance=1e-7)


def test_another_learning_rate_scale_is_refused_by_the_checkpoint():
    with pytest.raises(RuntimeError, match="value_lr_scale is 4 in the checkpoint and 2 in the"):
        build(value_lr_scale=2.0).load_state_dict(build(value_lr_scale=4.0).state_dict())
    with pytest.raises(RuntimeError, match="value_lr_scale"):
        build().load_state_dict(build(value_lr_scale=4.0).state_dict())
    with pytest.raises(RuntimeError, match="value_lr_scale"):
        build(value_lr_scale=4.0).load_state_dict(build().state_dict())


def test_scores_of_fewer_blocks_are_refused() -> None:
    """A rank has the keys of its own blocks only, and a selector may forget to gather."""
    memory = build("avgk-g4")
    memory.selector.forward = lambda inputs: Selection(
        torch.zeros(len(inputs.x), 1, dtype=torch.long), Scores(torch.zeros(len(inputs.x), 1))
    )
    with pytest.raises(ConfigError, match=r"^shards 1: avgk scores 1 of \d+ blocks: .*gather"):
        memory(torch.randn(3, memory.config.embed_dim, dtype=torch.float64))
