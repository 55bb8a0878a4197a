"""Inputs of any shape, number, layout and dtype."""

import dataclasses
import math
from itertools import product

import pytest
import torch

from fairseq_sffn.memory.selectors.pkm import PKM
from tests.memory.cases import (
    CASES,
    CPU_ENGINES,
    ENGINES,
    NATIVE_ENGINES,
    UNSCORED,
    build,
    close,
    tokens,
)
from tests.memory.oracle import assert_matches

SOME_CASES = ["avgk-g4", "lorkm-g4", "pkm", "hash_layer-bigram", "gshard-sampled", "base"]


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


@pytest.mark.parametrize("case", CASES)
def test_zero_tokens(case):
    ways = [*product((None,), (0.0, 1.0), ((0,), (3, 0)))]
    ways += product(ENGINES, (1.0,), ((3, 0),))  # an engine has neither the shape nor the factor
    for engine, capacity_factor, shape in ways:
        told = (engine, capacity_factor, shape)
        memory = build(case, capacity_factor=capacity_factor, engine=engine)
        x, token_ids = tokens(*shape)
        x.requires_grad_()
        out = memory(x, token_ids, padding_mask=torch.zeros(shape, dtype=torch.bool))
        assert out.output.shape == x.shape, told
        assert out.usage.counts.sum() == out.usage.dropped == 0, told
        losses = [t for t in (out.balance_loss, out.z_loss) if t is not None]
        assert all(loss == 0 for loss in losses), told
        (out.output.sum() + sum(losses)).backward()
        for name, parameter in memory.named_parameters():
            assert parameter.grad is None or (parameter.grad == 0).all(), (name, *told)


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


def balance_loss_if_even(memory):
    """Return the balance loss where all blocks have the same load and probability."""
    entropy = memory.config.selector_class.balance_loss_kind == "entropy"
    even = -math.log(memory.config.num_blocks) if entropy else 1.0
    return torch.tensor(even, dtype=torch.float64)


ONE_BLOCK = [case for case in CASES if not case.startswith("gshard")]


@pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
@pytest.mark.parametrize("case", ONE_BLOCK)
def test_one_block(case, capacity_factor):
    block_size, active = CASES[case]["block_size"], 1 + CASES[case].get("shared_blocks", 0)
    sizes = dict(num_cells=active * block_size, active_blocks=active)
    changes = dict(sizes, capacity_factor=capacity_factor)
    if case.startswith("pkm") and not case.startswith("pkm_ffn"):
        changes["selector"] = dataclasses.replace(CASES[case]["selector"], heads=1)
    memory = build(case, **changes)
    out = assert_matches(memory, *tokens(6))
    assert out.usage.counts.tolist() == [6]
    assert out.usage.dropped == (3 if capacity_factor else 0)
    if case not in UNSCORED:
        close(out.balance_loss, balance_loss_if_even(memory))


@pytest.mark.parametrize("case", CASES)
def test_equal_scores(case):
    """A tie may pick any distinct blocks (of each head), with equal weights."""
    memory, (x, token_ids) = build(case), tokens(9)
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if not name.startswith("value"):
                parameter.zero_()
    out = memory(x, token_ids)
    heads = 2 if case in ("pkm", "pkm-activation", "pkm-shared") else 1
    for row in (
        out.selection.blocks.unflatten(1, (-1, heads)).transpose(1, 2).flatten(0, 1).tolist()
    ):
        assert len(set(row)) == len(row)
        assert min(row) >= 0 and max(row) < memory.config.routed_blocks
    for weights in (out.selection.weights, out.selection.coefficients):
        if weights is not None:
            close(weights, weights[:1, :1].expand_as(weights))
    if out.balance_loss is not None:
        close(out.balance_loss, balance_loss_if_even(memory))
    assert out.output.isfinite().all()


@pytest.mark.parametrize("case", ["avgk-g4", "switch-top2"])
def test_ties_still_give_distinct_blocks(case):
    memory, (x, _) = build(case), tokens(8)
    with torch.no_grad():  # all blocks are the same
        for parameter in (memory.keys, memory.key_bias, memory.values):
            parameter.copy_(parameter[:1].expand_as(parameter))
        if case == "switch-top2":
            memory.selector.router.zero_()
    out = memory(x)
    assert all(
        len(set(row)) == memory.config.active_blocks for row in out.selection.blocks.tolist()
    )
    # A tie may leave out any blocks, as all are the same.
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


# Blocks whose choice cannot change with rounding: all blocks, or those of the token ids.
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
    "aoe": ("aoe-g8", dict(num_cells=16)),
    "moe": ("moe", dict(block_size=8)),
    "sigma_moe": ("sigma_moe", dict(block_size=8)),
    "hash_moe": ("hash_moe", dict(num_cells=48, block_size=8)),
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
