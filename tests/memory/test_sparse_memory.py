import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.memory.cases import CASE_GATES, CASES, build, close, tokens
from tests.memory.oracle import assert_matches

# Against the loops


@pytest.mark.parametrize(
    ("activation", "bias", "capacity_factor"), [("relu", True, 1.0), ("gelu", False, 0.0)]
)
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


@pytest.mark.parametrize(
    ("case", "training"),
    [*((case, True) for case in CASES), ("base", False), ("gshard-sampled", False)],
)
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
