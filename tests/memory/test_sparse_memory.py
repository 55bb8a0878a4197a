import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fairseq_sffn.memory import ConfigError
from fairseq_sffn.memory.selectors.pkm import PKM
from tests.memory.oracle import (
    CASE_GATES,
    CASES,
    CPU_ENGINES,
    NATIVE_ENGINES,
    UNSCORED,
    assert_matches,
    build,
    close,
    tokens,
)

SOME_CASES = ["avgk-g4", "lorkm-g4", "pkm", "hash_layer-bigram", "gshard-sampled", "base"]

# Against the loops


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize(("activation", "bias"), [("relu", True), ("relu", False), ("gelu", True)])
@pytest.mark.parametrize(("case", "gate"), CASE_GATES)
def test_equals_the_loops(case, gate, activation, bias, capacity_factor):
    memory = build(
        case, gate=gate, activation=activation, bias=bias, capacity_factor=capacity_factor
    )
    assert_matches(memory, *tokens(7))


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loops_with_padding(case, capacity_factor):
    memory = build(case, capacity_factor=capacity_factor)
    padding_mask = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)
    assert_matches(memory, *tokens(3, 4), padding_mask)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loops_in_evaluation(case):
    memory = build(case, capacity_factor=1.0, activation_dropout=0.5).eval()
    out = assert_matches(memory, *tokens(8))
    assert out.selection.kept is None


@pytest.mark.parametrize("case", ["avgk-g4", "gshard-sampled", "pkm", "base"])
def test_equals_the_loops_with_capacity_in_evaluation(case):
    out = assert_matches(build(case, eval_capacity_factor=0.7).eval(), *tokens(8))
    assert out.usage.dropped > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, training):
    memory = build(case, activation="gelu", gate="softmax").train(training)
    x, token_ids = tokens(3)
    names, parameters = zip(*memory.named_parameters(), strict=True)

    def call(x, *parameters):
        torch.manual_seed(1)  # the same draws each time
        out = functional_call(memory, dict(zip(names, parameters, strict=True)), (x, token_ids))
        return [t for t in (out.output, out.balance_loss, out.z_loss) if t is not None]

    inputs = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("gate", ["none", "softmax"])
@pytest.mark.parametrize("alone", ["x", "keys", "key_bias", "values", "value_bias"])
def test_the_gradient_of_one_tensor_needs_none_of_the_others(alone, gate):
    memory, (x, _) = build(gate=gate), tokens(8)
    tensors = {"x": x.requires_grad_(), **dict(memory.named_parameters())}
    (wanted,) = torch.autograd.grad(memory(x).output.square().sum(), tensors[alone])
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == alone)
    memory(x).output.square().sum().backward()
    close(tensors[alone].grad, wanted)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [alone]


# Against a dense FFN


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize(
    ("block_size", "gate"),
    [(1, "none"), (4, "none"), (16, "none"), (48, "none"), (48, "renormalized")],
)
@pytest.mark.parametrize("selector", ["avgk", "vanilla_m", "switch"])
def test_all_blocks_active_is_a_dense_ffn(selector, block_size, gate, activation, bias):
    assert_is_a_dense_ffn(
        build(
            selector=selector,
            num_cells=48,
            block_size=block_size,
            active_blocks=48 // block_size,
            gate=gate,
            activation=activation,
            bias=bias,
        )
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("case", "block_size"),
    [
        *((case, 48) for case in ("hash_layer", "hash_layer-bigram", "base")),
        *((case, 24) for case in ("gshard", "gshard-top3", "gshard-sampled")),
        *(("rand_hash", block_size) for block_size in (1, 4, 48)),
        *(("pkm_ffn", 1), ("vanilla_m-max", 1)),
    ],
)
def test_all_blocks_active_is_a_dense_ffn_with_other_selectors(case, block_size, training):
    sizes = dict(num_cells=48, block_size=block_size, active_blocks=48 // block_size)
    if case == "gshard-sampled" and training:
        pytest.skip("leaves out second blocks")
    assert_is_a_dense_ffn(build(case, gate="none", **sizes).train(training))


def assert_is_a_dense_ffn(memory):
    bias = memory.config.bias
    first = nn.Linear(8, 48, bias=bias, dtype=torch.float64)
    second = nn.Linear(48, 8, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        memory.keys.copy_(first.weight)
        memory.values.copy_(second.weight.t())
        if bias:
            memory.key_bias.copy_(first.bias)
            memory.value_bias.copy_(second.bias)
    x, token_ids = tokens(2, 5)
    y = memory(x.requires_grad_(), token_ids).output
    dense_y = second(memory.config.activation_fn(first(x)))
    close(y, dense_y, "output", 1e-12)

    pairs = [(memory.keys, first.weight), (memory.values, second.weight), (x, x)]
    if bias:
        pairs += [(memory.key_bias, first.bias), (memory.value_bias, second.bias)]
    ours, theirs = zip(*pairs, strict=True)
    cotangent = torch.randn_like(y)
    for parameter, grad, wanted in zip(
        ours,
        torch.autograd.grad(y, ours, cotangent),
        torch.autograd.grad(dense_y, theirs, cotangent),
        strict=True,
    ):
        close(grad.t() if parameter is memory.values else grad, wanted, "gradient", 1e-12)


def test_one_active_block_renormalized_weighs_nothing():
    plain, gated = build(active_blocks=1), build(active_blocks=1, gate="renormalized")
    gated.load_state_dict(plain.state_dict())
    x, _ = tokens(8)
    close(gated(x).output, plain(x).output, tolerance=1e-12)


# Shapes and dtypes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (3, 1, 2)])
@pytest.mark.parametrize("case", SOME_CASES)
def test_any_leading_shape(case, shape, training):
    memory = build(case).train(training)
    x, token_ids = tokens(*shape)
    torch.manual_seed(1)
    out = memory(x, token_ids)
    torch.manual_seed(1)
    flat = memory(x.reshape(-1, 8), token_ids.reshape(-1, 2))
    assert out.output.shape == x.shape
    close(out.output.reshape(-1, 8), flat.output, tolerance=1e-12)


@pytest.mark.parametrize("engine", [*CPU_ENGINES, None])
@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("case", CASES)
def test_zero_tokens(case, shape, capacity_factor, engine):
    memory = build(case, capacity_factor=capacity_factor, engine=engine)
    x, token_ids = tokens(*shape)
    x.requires_grad_()
    out = memory(x, token_ids, padding_mask=torch.zeros(shape, dtype=torch.bool))
    assert out.output.shape == x.shape
    assert out.usage.counts.sum() == out.usage.dropped == 0
    losses = [t for t in (out.balance_loss, out.z_loss) if t is not None]
    assert all(loss == 0 for loss in losses)
    (out.output.sum() + sum(losses)).backward()
    assert all((p.grad == 0).all() for p in memory.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", CASES)
def test_all_padding(case):
    out = build(case, capacity_factor=1.0)(*tokens(4), padding_mask=torch.ones(4, dtype=torch.bool))
    assert out.usage.counts.sum() == out.usage.dropped == 0
    assert out.usage.importance.sum() == 0
    assert all(loss == 0 for loss in (out.balance_loss, out.z_loss) if loss is not None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_repeated_tokens(case, training):
    x, token_ids = tokens(1)
    memory = build(case).train(training)
    out = assert_matches(memory, x.repeat(8, 1), token_ids.repeat(8, 1))
    if training and case in ("base", "gshard-sampled"):
        return
    close(out.output, out.output[:1].expand(8, -1), tolerance=1e-12)
    assert out.usage.counts.max() >= 8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_one_token(case, training):
    out = assert_matches(build(case).train(training), *tokens(1))
    assert out.output.shape == (1, 8)


ONE_BLOCK = [case for case in CASES if not case.startswith("gshard")]


@pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
@pytest.mark.parametrize("case", ONE_BLOCK)
def test_one_block(case, capacity_factor):
    block_size = CASES[case]["block_size"]
    changes = dict(num_cells=block_size, active_blocks=1, capacity_factor=capacity_factor)
    if case.startswith("pkm") and case != "pkm_ffn":
        changes["selector"] = dataclasses.replace(CASES[case]["selector"], heads=1)
    out = assert_matches(build(case, **changes), *tokens(6))
    assert out.usage.counts.tolist() == [6]
    assert out.usage.dropped == (3 if capacity_factor else 0)
    if case not in UNSCORED:
        close(out.balance_loss, torch.ones_like(out.balance_loss))


@pytest.mark.parametrize("case", CASES)
def test_equal_scores(case):
    """Whatever a tie picks: distinct blocks (of each head), and alike weights."""
    memory, (x, token_ids) = build(case), tokens(9)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if not name.startswith("value"):
                parameter.zero_()
    out = memory(x, token_ids)
    heads = 2 if case in ("pkm", "pkm-activation") else 1
    for row in (
        out.selection.blocks.unflatten(1, (-1, heads)).transpose(1, 2).flatten(0, 1).tolist()
    ):
        assert len(set(row)) == len(row)
        assert min(row) >= 0 and max(row) < memory.config.num_blocks
    for weights in (out.selection.weights, out.selection.coefficients):
        if weights is not None:
            close(weights, weights[:1, :1].expand_as(weights))
    if out.balance_loss is not None:
        close(out.balance_loss, torch.ones_like(out.balance_loss))
    assert out.output.isfinite().all()


@pytest.mark.parametrize("case", ["avgk-g4", "switch-top2"])
def test_ties_still_give_distinct_blocks(case):
    memory, (x, _) = build(case), tokens(8)
    with torch.no_grad():  # every block the same
        for parameter in (memory.keys, memory.key_bias, memory.values):
            parameter.copy_(parameter[:1].expand_as(parameter))
        if case == "switch-top2":
            memory.selector.router.zero_()
    out = memory(x)
    assert all(
        len(set(row)) == memory.config.active_blocks for row in out.selection.blocks.tolist()
    )
    # Whichever blocks a tie leaves out: they are all the same.
    hidden = torch.relu(x @ memory.keys[0] + memory.key_bias[0])
    weights = 1 if out.selection.weights is None else out.selection.weights.mean()
    wanted = weights * memory.config.active_cells * hidden[:, None] * memory.values[0]
    close(out.output, wanted + memory.value_bias)


@pytest.mark.parametrize("case", SOME_CASES)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "columns"])
def test_x_need_not_be_contiguous(case, layout):
    x = {
        "transposed": torch.randn(4, 2, 8, dtype=torch.float64).transpose(0, 1),
        "strided": torch.randn(2, 4, 16, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(2, 1, 8, dtype=torch.float64).expand(2, 4, 8),
        "columns": torch.randn(8, 2, 4, dtype=torch.float64).permute(1, 2, 0),
    }[layout]
    assert not x.is_contiguous()
    memory, token_ids = build(case), tokens(2, 4)[1]
    inputs = [x, x.contiguous()]
    outputs = []
    for v in inputs:
        torch.manual_seed(1)
        outputs.append(memory(v.requires_grad_(), token_ids).output)
    close(*outputs, tolerance=1e-12)
    cotangent = torch.randn(8, 4, 2, dtype=torch.float64).permute(2, 1, 0)
    grads = [torch.autograd.grad(y, v, cotangent)[0] for v, y in zip(inputs, outputs, strict=True)]
    close(*grads, tolerance=1e-12)


# Blocks whose choice cannot change with rounding: all of them, or those of the token ids.
ROBUST = {
    "avgk": ("avgk-g16", dict(num_cells=32, gate="sigmoid")),
    "vanilla_m": ("vanilla_m-avg", dict(num_cells=16, block_size=8, gate="sigmoid")),
    "lorkm": ("lorkm-g4", dict(num_cells=16, block_size=8, gate="sigmoid")),
    "pkm": ("pkm-prime", dict(num_cells=6, active_blocks=6)),
    "pkm-activation": (
        "pkm-prime",
        dict(selector=PKM.Config(heads=1, coefficients="activation"), num_cells=6, active_blocks=6),
    ),
    "pkm_ffn": ("pkm_ffn", dict(num_cells=6, active_blocks=6)),
    "rand_hash": ("rand_hash", dict(num_cells=48, block_size=8)),
    "switch": ("switch-top2", dict(num_cells=16, gate="softmax")),
    "gshard": ("gshard", dict(block_size=8)),
    "base": ("base", dict(num_cells=8, block_size=8)),
    "hash_layer": ("hash_layer", {}),
    "hash_layer-bigram": ("hash_layer-bigram", {}),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("engine", [None, "grouped", *CPU_ENGINES])
@pytest.mark.parametrize("robust", ROBUST)
def test_other_dtypes(robust, engine, dtype, tolerance):
    if engine in NATIVE_ENGINES and dtype == torch.bfloat16:
        pytest.skip("native engines compute fp32 and fp64")
    if engine == "grouped" and robust.startswith("pkm"):
        pytest.skip("grouped_mm does not take blocks of one cell")
    case, changes = ROBUST[robust]
    memory = build(case, dtype, engine=engine, **changes)
    x, token_ids = tokens(8, dtype=dtype)
    exact = build(case, **changes)
    exact.load_state_dict(memory.state_dict())
    exact_x = x.double().requires_grad_()
    x.requires_grad_()
    y, exact_y = memory(x, token_ids).output, exact(exact_x, token_ids).output
    assert y.dtype == dtype
    close(y.double(), exact_y, "output", tolerance)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    exact_y.backward(cotangent.double())
    close(x.grad.double(), exact_x.grad, "x", tolerance)
    for (name, p), q in zip(memory.named_parameters(), exact.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
        else:
            assert p.grad.dtype == dtype
            # Gradients of a table sum over 8 tokens, hence the relative part.
            close(p.grad.double(), q.grad, name, tolerance * max(1, float(q.grad.abs().max())))


@pytest.mark.parametrize("robust", ROBUST)
def test_autocast_is_close_and_leaves_gradients_in_fp32(robust):
    case, changes = ROBUST[robust]
    memory = build(case, torch.float32, **changes)
    x, token_ids = tokens(8, dtype=torch.float32)
    x.requires_grad_()
    exact = memory(x, token_ids).output
    cotangent = torch.randn_like(exact)
    names, tensors = zip(("x", x), *memory.named_parameters(), strict=True)
    options = dict(allow_unused=True, materialize_grads=True)
    exact_grads = torch.autograd.grad(exact, tensors, cotangent, **options)
    with torch.autocast("cpu", torch.bfloat16):
        y = memory(x, token_ids).output
    assert y.dtype == torch.bfloat16
    close(y.float(), exact, tolerance=0.1)
    grads = torch.autograd.grad(y, tensors, cotangent.bfloat16(), **options)
    for name, grad, wanted in zip(names, grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        close(grad, wanted, name, 0.05 * max(1, float(wanted.abs().max())))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_method_runs_under_autocast(case, training):
    memory = build(case, torch.float32, gate="softmax", capacity_factor=1.0).train(training)
    x, token_ids = tokens(12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = memory(x.requires_grad_(), token_ids, padding_mask=torch.arange(12) > 9)
        losses = [loss for loss in (out.balance_loss, out.z_loss) if loss is not None]
        total = out.output.float().square().sum() + sum(losses)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
    total.backward()
    for name, parameter in [("x", x), *memory.named_parameters()]:
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_leaves_the_switch_gate_and_the_losses_in_fp32(masked):
    memory, (x, _) = build("switch-top2", torch.float32), tokens(6, dtype=torch.float32)
    padding_mask = torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.bool) if masked else None
    exact = memory(x, padding_mask=padding_mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = memory(x, padding_mask=padding_mask)
    torch.testing.assert_close(out.selection.scores.logits, exact.selection.scores.logits)
    torch.testing.assert_close(out.balance_loss, exact.balance_loss)
    torch.testing.assert_close(out.z_loss, exact.z_loss)


# Neighbours and padding


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_neighbours_do_not_matter_in_evaluation(case, capacity_factor):
    memory = build(case, capacity_factor=capacity_factor).eval()
    x, token_ids = tokens(20)
    whole = memory(x, token_ids).output
    permutation = torch.randperm(20)
    close(memory(x[permutation], token_ids[permutation]).output, whole[permutation])
    close(memory(x[3:9], token_ids[3:9]).output, whole[3:9])
    close(memory(x[5], token_ids[5]).output, whole[5])
    crowd = memory(x[5].expand(50, 8), token_ids[5].expand(50, 2)).output
    close(crowd, whole[5].expand(50, 8))
    padded = memory(x, token_ids, padding_mask=torch.rand(20) < 0.5).output
    close(padded, whole)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_later_tokens_change_nothing_earlier(case, training):
    if training and case == "base":
        pytest.skip("balances all tokens of the batch against each other")
    memory = build(case, capacity_factor=0.0).train(training)
    (x, token_ids), (other_x, other_ids) = tokens(3, 10), tokens(3, 10)
    other_x, other_ids = 100 * other_x, other_ids.clone()
    other_x[:, :6], other_ids[:, :6] = x[:, :6], token_ids[:, :6]
    torch.manual_seed(1)
    before = memory(x, token_ids).output
    torch.manual_seed(1)
    after = memory(other_x, other_ids).output
    close(after[:, :6], before[:, :6], tolerance=1e-12)
    assert not torch.allclose(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("scale", [10, 1e6])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_stands_at_padding_changes_nothing_else(case, training, scale):
    memory = build(case, capacity_factor=1.0).train(training)
    padding_mask = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    (x, token_ids), (other_x, other_ids) = tokens(2, 5), tokens(2, 5)
    other_x = torch.where(padding_mask.unsqueeze(-1), scale * other_x, x)
    other_ids = torch.where(padding_mask.unsqueeze(-1), other_ids, token_ids)

    def call(x, token_ids, padding_mask=None):
        torch.manual_seed(1)
        return memory(x, token_ids, padding_mask=padding_mask)

    a = call(x, token_ids, padding_mask)
    others = [call(other_x, other_ids, padding_mask)]
    if not (training and case == "gshard-sampled"):  # fewer tokens draw other lots
        others.append(call(x[~padding_mask], token_ids[~padding_mask]))  # no padding at all
    for other in others:
        output = other.output[~padding_mask] if other is others[0] else other.output
        close(output, a.output[~padding_mask], "output", 1e-12)
        assert torch.equal(other.usage.counts, a.usage.counts)
        assert other.usage.dropped == a.usage.dropped
        close(other.usage.importance, a.usage.importance, "importance", 1e-6)
        if a.balance_loss is not None:
            close(other.balance_loss, a.balance_loss, "balance_loss", 1e-12)
            close(other.z_loss, a.z_loss, "z_loss", 1e-12)
    if not (training and case == "gshard-sampled"):
        assert a.usage.counts.sum() == 6 * memory.config.active_blocks


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNSCORED])
def test_padding_gets_no_gradient_from_the_losses(case):
    memory, (x, token_ids) = build(case), tokens(6)
    padding_mask = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    out = memory(x.requires_grad_(), token_ids, padding_mask=padding_mask)
    (grad,) = torch.autograd.grad(out.balance_loss + out.z_loss, x)
    assert (grad[padding_mask] == 0).all()
    assert (grad[~padding_mask] != 0).any(dim=1).all()


# Stored and restored


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


# Capacity


def test_dropped_tokens_get_only_the_output_bias():
    memory, (x, _) = build("switch-top1", capacity_factor=1.0), tokens(1)
    out = memory(x.repeat(8, 1))  # 8 tokens to one of 4 blocks with room for 2
    assert out.usage.dropped == 6
    assert out.usage.counts.max() == 8
    assert (out.output[:2] != memory.value_bias).any()
    assert torch.equal(out.output[2:], memory.value_bias.expand(6, -1))
    without = build("switch-top1", capacity_factor=1.0, bias=False)(x.repeat(8, 1))
    assert (without.output[2:] == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_each_mode_has_its_own_capacity(training):
    factors = dict(capacity_factor=1.0, eval_capacity_factor=2.0)
    memory = build("switch-top1", **factors).train(training)
    out = memory(tokens(1)[0].repeat(8, 1))
    assert out.usage.dropped == (6 if training else 4)


def test_evaluation_is_dropless_by_default():
    memory = build("switch-top1", capacity_factor=1.0).eval()
    out = memory(tokens(1)[0].repeat(8, 1))
    assert out.usage.dropped == 0
    close(out.output, out.output[:1].expand(8, -1), tolerance=1e-12)


# Everything else the module promises


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
                selection.scores.mean_probs(None)
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
    """The losses keep scores and probabilities (N, B); the rest is the dense FFN's and an index."""
    num_tokens, width, pairs, active = 256, 64, 256 * 4, 4 * 64
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
    plan = 4 * pairs  # the tokens, which the hooks do not see
    assert _bytes_kept(lambda: memory(x), memory) + plan - scores <= 1.15 * dense_bytes


def _bytes_kept(call, module) -> int:
    """Bytes of the distinct storages saved for backward that are no parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        # Held on to, so that no two of them have the same address.
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
