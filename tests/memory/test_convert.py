"""Memories from the blocks of other libraries, against plain loops and against transformers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_sffn.memory import ConfigError
from fairseq_sffn.memory.convert import (
    from_deepseek_v3,
    from_mixtral,
    from_olmoe,
    from_qwen_moe,
    from_switch,
)
from tests.memory.cases import close

WIDTH, UNITS, EXPERTS, CHOICES = 8, 12, 5, 2
SETTINGS = dict(
    num_experts_per_tok=CHOICES,
    hidden_act="silu",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    n_shared_experts=2,
    n_group=1,
)
NAMES = {"mixtral": ("w1", "w3", "w2")}


def expert_tensors(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Draw a block in the layout of published checkpoints: a tensor for each expert."""
    keys, up, values = NAMES.get(kind, ("gate_proj", "up_proj", "down_proj"))
    shapes = {"gate": (EXPERTS, WIDTH)}
    for number in range(EXPERTS):
        shapes |= {
            f"experts.{number}.{keys}": (UNITS, WIDTH),
            f"experts.{number}.{up}": (UNITS, WIDTH),
            f"experts.{number}.{values}": (WIDTH, UNITS),
        }
    if kind == "deepseek_v3":
        shapes |= {
            "shared_experts.gate_proj": (2 * UNITS, WIDTH),
            "shared_experts.up_proj": (2 * UNITS, WIDTH),
            "shared_experts.down_proj": (WIDTH, 2 * UNITS),
        }
    tensors = {f"{name}.weight": torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if kind == "deepseek_v3":
        tensors["gate.e_score_correction_bias"] = torch.randn(EXPERTS)
    return tensors


def fused(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Put the experts' tensors together, as modules of transformers 5 have them."""
    names = NAMES.get(kind, ("gate_proj", "up_proj", "down_proj"))
    keys, up, values = (
        torch.stack([tensors[f"experts.{number}.{name}.weight"] for number in range(EXPERTS)])
        for name in names
    )
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith("experts.")}
    together = torch.cat([keys, up], dim=1)
    return {**others, "experts.gate_up_proj": together, "experts.down_proj": values}


def gated_ffn(x: Tensor, keys: Tensor, up: Tensor, values: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, keys)) * F.linear(x, up), values)


def looped(x: Tensor, tensors: dict[str, Tensor], kind: str, normed: bool) -> Tensor:
    """Compute a block token by token."""
    names = NAMES.get(kind, ("gate_proj", "up_proj", "down_proj"))
    outputs = []
    for token in x:
        logits = tensors["gate.weight"] @ token
        sigmoid = kind == "deepseek_v3"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=0)
        biased = scores + tensors["gate.e_score_correction_bias"] if sigmoid else scores
        chosen = biased.topk(CHOICES).indices.tolist()
        weights = scores[chosen] / (scores[chosen].sum() if normed else 1)
        if sigmoid:
            weights = weights * SETTINGS["routed_scaling_factor"]
        output = torch.zeros_like(token)
        for number, weight in zip(chosen, weights, strict=True):
            expert = (tensors[f"experts.{number}.{name}.weight"] for name in names)
            output = output + weight * gated_ffn(token, *expert)
        if sigmoid:
            shared = (tensors[f"shared_experts.{name}.weight"] for name in names)
            output = output + gated_ffn(token, *shared)
        outputs.append(output)
    return torch.stack(outputs)


FUNCTIONS = {
    "mixtral": from_mixtral,
    "qwen_moe": from_qwen_moe,
    "olmoe": from_olmoe,
    "deepseek_v3": from_deepseek_v3,
}


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize(
    ("kind", "normed"),
    [(kind, normed) for kind in FUNCTIONS for normed in (True, False) if kind != "mixtral"]
    + [("mixtral", True)],
)
def test_tensors_by_name_give_the_outputs_of_the_block(kind, normed, layout):
    tensors = expert_tensors(kind)
    given = fused(tensors, kind) if layout == "fused" else tensors
    given = {f"layers.3.{name}": tensor for name, tensor in given.items()}
    config = SETTINGS | {"norm_topk_prob": normed}
    memory = FUNCTIONS[kind](given, config, "layers.3.")
    assert memory.config.active_blocks == CHOICES + 2 * (kind == "deepseek_v3")
    ours = torch.randn(40, WIDTH, dtype=torch.float64).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    y, wanted = memory(ours).output, looped(theirs, tensors, kind, normed)
    close(y, wanted, "output", 1e-6)  # the bias is in fp32
    cotangent = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, ours, cotangent)
    close(grad, torch.autograd.grad(wanted, theirs, cotangent)[0], "gradient of x", 1e-6)
    again = FUNCTIONS[kind](given, SimpleNamespace(**config), "layers.3.")
    for name, tensor in memory.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def switch_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"router.classifier": (EXPERTS, WIDTH)}
    for number in range(EXPERTS):
        shapes[f"experts.expert_{number}.wi"] = (UNITS, WIDTH)
        shapes[f"experts.expert_{number}.wo"] = (WIDTH, UNITS)
    return {f"{name}.weight": torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def test_switch_from_tensors():
    tensors = switch_tensors()
    memory = from_switch(tensors, {"dense_act_fn": "relu", "dropout_rate": 0.25})
    assert memory.training and memory.dropout.p == 0.25
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    wanted = []
    for token in x:
        probs = (tensors["router.classifier.weight"] @ token).softmax(dim=0)
        number = int(probs.argmax())
        first, second = (tensors[f"experts.expert_{number}.{n}.weight"] for n in ("wi", "wo"))
        wanted.append(probs[number] * (second @ F.relu(first @ token)))
    close(memory.eval()(x).output, torch.stack(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype):
    tensors = expert_tensors("deepseek_v3", dtype)
    tensors["gate.weight"] = tensors["gate.weight"].float()  # as in DeepSeek-V3
    memory = from_deepseek_v3(tensors, SETTINGS)
    own = {"selector.router": torch.float32, "balancer.bias": torch.float32}
    for name, tensor in memory.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == own.get(name, dtype), name
    assert torch.equal(memory.balancer.bias, tensors["gate.e_score_correction_bias"])
    assert not memory.balancer.loads.any() and not memory.balancer.moments.any()
    assert memory(torch.randn(3, WIDTH, dtype=dtype)).output.dtype == dtype


class Counted(Mapping):
    """Counts how often each tensor is read, as by a mapping that loads what is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        self.reads[name] += 1
        return tensor

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("layout", ["experts", "fused"])
def test_each_large_tensor_is_read_once_and_copied(layout):
    tensors = expert_tensors("mixtral")
    given = Counted(fused(tensors, "mixtral") if layout == "fused" else tensors)
    memory = from_mixtral(given, SETTINGS)
    first = "experts.gate_up_proj" if layout == "fused" else "experts.0.w1.weight"
    assert given.reads == {name: 3 if name == first else 1 for name in given}  # its name, its shape
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    for tensor in given.values():
        tensor.zero_()
    for name, tensor in memory.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_converted_memory_trains():
    memory = from_deepseek_v3(expert_tensors("deepseek_v3"), SETTINGS, balance_rate=0.5)
    before = memory.balancer.bias.clone()
    memory(torch.randn(40, WIDTH, dtype=torch.float64)).output.square().sum().backward()
    assert all(each.grad is not None for each in memory.parameters())
    memory.end_update()
    step = (memory.balancer.bias - before).abs().max().item()
    assert step == pytest.approx(0.5, abs=1e-6)


REFUSED = {
    "n_group": (from_deepseek_v3, {"n_group": 4}, "^n_group 4: no selector chooses groups"),
    "softmax": (from_deepseek_v3, {"scoring_func": "softmax"}, "^scoring_func softmax: is not"),
    "no rate": (from_deepseek_v3, {}, "^balance_rate 0.0: must be positive"),
    "activation": (from_mixtral, {"hidden_act": "gelu_new"}, "^hidden_act gelu_new: is none of"),
    "relu": (from_mixtral, {"hidden_act": "relu"}, "^glu relu: is none of silu, gelu$"),
    "no setting": (from_qwen_moe, {"norm_topk_prob": None}, "^norm_topk_prob None: is not in the"),
    "no router": (from_switch, {}, "^weights router.classifier.weight: is not there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused_in_one_line(case):
    function, changes, message = REFUSED[case]
    tensors = expert_tensors("mixtral" if function is from_mixtral else "deepseek_v3")
    rate = {"balance_rate": 0.0} if case == "no rate" else {}
    with pytest.raises(ConfigError, match=message) as refused:
        function(tensors, SETTINGS | changes, **rate)
    assert "\n" not in str(refused.value)


def test_blocks_that_differ_are_refused():
    tensors = expert_tensors("qwen_moe")
    gated = tensors | {"shared_expert_gate.weight": torch.randn(1, WIDTH)}
    with pytest.raises(ConfigError, match=r"^weights shared_expert_gate\.weight: a shared expert"):
        from_qwen_moe(gated, SETTINGS)
    quantised = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    with pytest.raises(ConfigError, match=r"^weights torch\.float8_e4m3fn: quantised"):
        from_qwen_moe(quantised, SETTINGS)
    biased = switch_tensors() | {"router.classifier.bias": torch.randn(EXPERTS)}
    with pytest.raises(ConfigError, match=r"^router_bias True"):
        from_switch(biased, {"dense_act_fn": "relu"})


@pytest.mark.parametrize("function", [from_mixtral, from_qwen_moe, from_olmoe])
@pytest.mark.parametrize("name", ["shared_experts.up_proj.weight", "gate.e_score_correction_bias"])
def test_a_block_with_more_tensors_is_refused(function, name):
    """A tensor that nothing reads would be missing in the outputs."""
    tensors = {"1." + key: tensor for key, tensor in expert_tensors("mixtral").items()}
    if function is not from_mixtral:
        tensors = {"1." + key: tensor for key, tensor in expert_tensors("qwen_moe").items()}
    others = {"0." + name: torch.randn(2), "norm.weight": torch.randn(2)}
    function(tensors | others, SETTINGS, "1.")  # other blocks of the model
    with pytest.raises(
        ConfigError, match=rf"^weights 1\.{name}: has no counterpart: is it another"
    ):
        function(tensors | {f"1.{name}": torch.randn(2)}, SETTINGS, "1.")


# transformers' blocks


BLOCKS = {
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock", from_mixtral),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", from_qwen_moe),
    "olmoe": ("OlmoeConfig", "OlmoeSparseMoeBlock", from_olmoe),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE", from_deepseek_v3),
    "switch_transformers": (
        "SwitchTransformersConfig",
        "SwitchTransformersSparseMLP",
        from_switch,
    ),
}
SIZES = {
    "switch_transformers": dict(d_model=WIDTH, d_ff=UNITS, num_experts=EXPERTS),
    "deepseek_v3": dict(
        n_routed_experts=EXPERTS, moe_intermediate_size=UNITS, n_group=1, topk_group=1
    ),
    "qwen3_moe": dict(num_experts=EXPERTS, moe_intermediate_size=UNITS),
    "olmoe": dict(num_experts=EXPERTS, intermediate_size=UNITS),
    "mixtral": dict(num_local_experts=EXPERTS, intermediate_size=UNITS),
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mixtral", {}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("olmoe", {}),
        ("olmoe", {"norm_topk_prob": True}),
        ("deepseek_v3", {"n_shared_experts": 1}),
        ("deepseek_v3", {"n_shared_experts": 3, "norm_topk_prob": False}),
        ("switch_transformers", {}),
    ],
)
def test_equals_the_block_of_transformers(kind, changes):
    """Outputs and the gradients of x, in fp32."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    config_name, block_name, function = BLOCKS[kind]
    package = f"transformers.models.{kind}"
    configs = importlib.import_module(f"{package}.configuration_{kind}")
    models = importlib.import_module(f"{package}.modeling_{kind}")
    width = {} if kind == "switch_transformers" else {"hidden_size": WIDTH}
    if kind != "switch_transformers":
        width |= {"num_experts_per_tok": CHOICES}
    config = getattr(configs, config_name)(**width | SIZES[kind] | changes)
    config._attn_implementation = config._experts_implementation = "eager"
    block = getattr(models, block_name)(config).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    if kind == "deepseek_v3":
        block.gate.e_score_correction_bias.normal_()
    memory = function(block, config)
    assert not memory.training

    ours = torch.randn(3, 7, WIDTH).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    wanted = block(theirs)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted  # transformers 4
    y, cotangent = memory(ours).output, torch.randn_like(wanted)
    y.backward(cotangent), wanted.backward(cotangent)
    close(y, wanted, "output", 1e-5)
    close(ours.grad, theirs.grad, "gradient of x", 1e-5)
    assert wanted.abs().max() > 0.5
