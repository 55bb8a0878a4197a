"""Selectors defined here that return more than blocks."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fairseq_sffn.memory import MemoryConfig, Selection, Selector, SelectorConfig, SparseMemory
from fairseq_sffn.memory.scores import Scores
from fairseq_sffn.memory.validation import ConfigError
from tests.memory.cases import CPU_ENGINES, build, close, tokens


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Remove selectors defined in a test afterwards."""
    monkeypatch.setattr(Selector, "registry", dict(Selector.registry))


def assert_same(output, expected, inputs):
    """Check that values and the gradients of the inputs are equal."""
    close(output, expected)
    cotangent = torch.randn_like(expected)
    for got, wanted in zip(
        # The graphs may share parts.
        torch.autograd.grad(output, inputs, cotangent, retain_graph=True),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        close(got, wanted, "gradient")


def define_own_keys(key_table: str):
    """Define a selector with its own keys, cells of block size 1, and scores that are the
    coefficients."""

    class OwnKeys(Selector):
        name = "own_keys"
        scores_blocks = False

        def __init__(self, config):
            super().__init__(config)
            self.active = config.active_blocks
            self.sub_keys = nn.Parameter(torch.randn(config.num_cells, config.embed_dim))

        @classmethod
        def num_params(cls, config):
            return config.num_cells * config.embed_dim

        def forward(self, inputs):
            assert inputs.keys is None and inputs.key_bias is None
            top = (inputs.x @ self.sub_keys.t()).topk(self.active)
            return Selection(top.indices, coefficients=top.values.sin())

    OwnKeys.key_table = key_table
    return OwnKeys


@pytest.mark.parametrize("engine", [*CPU_ENGINES, None])
@pytest.mark.parametrize("key_table", ["own", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_coefficients(bias, key_table, engine):
    define_own_keys(key_table)
    memory = build(selector="own_keys", block_size=1, active_blocks=5, bias=bias, engine=engine)
    assert memory.keys is None and memory.key_bias is None
    assert memory.config.num_params() == sum(p.numel() for p in memory.parameters())
    x = tokens(2, 6)[0].requires_grad_()
    out = memory(x)
    assert out.balance_loss is None and out.z_loss is None

    scores = x @ memory.selector.sub_keys.t()
    used = torch.zeros_like(scores).scatter(2, out.selection.blocks.view(2, 6, 5), 1.0)
    expected = (scores.sin() * used) @ memory.values
    if bias:
        expected = expected + memory.value_bias
    assert_same(out.output, expected, (x, *memory.parameters()))


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_duplicates_within_a_row_add_up(engine):
    class Twice(Selector):
        name = "twice"
        key_table = "none"
        scores_blocks = False

        def forward(self, inputs):
            blocks_NA = torch.tensor([[3, 1, 3]]).expand(len(inputs.x), 3)
            return Selection(blocks_NA, coefficients=inputs.x[:, :3])

    memory = build(selector="twice", block_size=1, active_blocks=3, engine=engine)
    x = tokens(6)[0].requires_grad_()
    output = memory(x).output
    values = memory.values
    expected = (x[:, :1] + x[:, 2:3]) * values[3] + x[:, 1:2] * values[1] + memory.value_bias
    assert_same(output, expected, (x, memory.values))


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["none", "renormalized"])
@pytest.mark.parametrize("bias", [True, False])
def test_pre_activations(bias, gate, capacity_factor, engine):
    class Shifted(Selector):
        """Shifts all pre-activations, so that they cannot come from elsewhere."""

        name = "shifted"

        def __init__(self, config):
            super().__init__(config)
            self.block_size, self.active = config.block_size, config.active_blocks

        def pre_activations(self, x_ND, keys_CD, key_bias_C):
            pre_NC = nn.functional.linear(x_ND, keys_CD, key_bias_C) + 0.3
            return pre_NC.unflatten(1, (-1, self.block_size))

        def forward(self, inputs):
            pre_NBG = self.pre_activations(inputs.x, inputs.keys, inputs.key_bias)
            scores_NB = pre_NBG.amax(dim=2)
            blocks_NA = scores_NB.topk(self.active).indices
            pre_NAG = pre_NBG.gather(1, blocks_NA.unsqueeze(2).expand(-1, -1, self.block_size))
            return Selection(blocks_NA, scores=Scores(scores_NB), pre_activations=pre_NAG)

    memory = build(
        selector="shifted", bias=bias, gate=gate, capacity_factor=capacity_factor, engine=engine
    )
    x = tokens(8)[0].requires_grad_()
    out = memory(x)
    blocks_NA, scores_NB = out.selection.blocks, out.selection.scores.logits
    weights_NA = torch.ones(8, 4, dtype=torch.float64)
    if gate == "renormalized":
        weights_NA = scores_NB.gather(1, blocks_NA).softmax(dim=1)
        close(out.selection.weights, weights_NA)
    if capacity_factor:
        assert out.usage.dropped > 0
        weights_NA = weights_NA * out.selection.kept
    weights_NB = torch.zeros_like(scores_NB).scatter(1, blocks_NA, weights_NA)
    hidden_NBG = memory.selector.pre_activations(x, memory.keys, memory.key_bias).relu()
    expected = (hidden_NBG * weights_NB.unsqueeze(2)).flatten(1) @ memory.values
    assert_same(
        out.output,
        expected if memory.value_bias is None else expected + memory.value_bias,
        (x, *memory.parameters()),
    )


@pytest.mark.parametrize("context_tokens", [1, 2, 3])
def test_trailing_tokens_reach_the_selector(context_tokens):
    seen = []

    class Trailing(Selector):
        name = "trailing"
        scores_blocks = False

        def forward(self, inputs):
            seen.append(inputs.token_ids)
            return Selection(torch.zeros(len(inputs.x), 1, dtype=torch.int64))

    Trailing.context_tokens = classmethod(lambda cls, config: context_tokens)
    memory = build(selector="trailing", active_blocks=1)
    x, token_ids = tokens(2, 5)[0], torch.randint(10, (2, 5, 3))
    memory(x, token_ids)  # more tokens than it asks for: the last ones count
    assert torch.equal(seen[0], token_ids[..., 3 - context_tokens :].reshape(10, context_tokens))
    if context_tokens == 1:
        memory(x, token_ids[..., 2])
        assert torch.equal(seen[1], seen[0])
    else:
        with pytest.raises(ValueError, match="token_ids"):
            memory(x, token_ids[..., : context_tokens - 1])


def test_weights_of_the_selector_itself():
    class Weighed(Selector):
        name = "weighed"
        scores_blocks = False

        def forward(self, inputs):
            blocks_NA = torch.tensor([[0, 1]]).expand(len(inputs.x), 2)
            return Selection(blocks_NA, weights=inputs.x[:, :2])

    memory = build(selector="weighed", active_blocks=2)
    x = tokens(6)[0].requires_grad_()
    output = memory(x).output
    hidden = torch.relu(x @ memory.keys[:8].t() + memory.key_bias[:8])
    hidden = hidden * x[:, :2].repeat_interleave(4, dim=1)
    expected = hidden @ memory.values[:8] + memory.value_bias
    assert_same(output, expected, (x, *memory.parameters()))


# Registration


def test_a_selector_is_registered_by_being_defined():
    class Mine(Selector):
        name = "my_method"

        @dataclass(frozen=True)
        class Config(SelectorConfig):
            rank: int = 3

    assert Selector.registry["my_method"] is Mine
    assert Mine.Config.selector_class is Mine
    assert Mine.flag_prefix == "my-method"
    config = MemoryConfig(8, 64, 4, 4, selector=Mine.Config(rank=5))
    assert config.selector_class is Mine and config.selector_options.rank == 5
    assert isinstance(SparseMemory(config).selector, Mine)


def test_a_helper_without_a_name_is_not_registered():
    before = dict(Selector.registry)

    class Helper(Selector):
        pass

    assert Selector.registry == before

    class First(Helper):
        name = "first"

    class Second(Helper):
        name = "second"

    assert Selector.registry == {**before, "first": First, "second": Second}
    assert First.Config is not Second.Config
    assert First.Config().selector_class is First


def test_a_name_belongs_to_one_selector():
    avgk = Selector.registry["avgk"]
    with pytest.raises(TypeError, match=r"Other: the name avgk belongs to .*\.avgk\.AvgK$"):

        class Other(Selector):
            name = "avgk"

    assert Selector.registry["avgk"] is avgk is avgk.Config.selector_class


def test_a_module_that_is_loaded_again_replaces_its_selector():
    first, second = define_own_keys("own"), define_own_keys("own")
    assert Selector.registry["own_keys"] is second is not first


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("declared", "refused"), [(0, True), (64 * 8, False), (64 * 8 + 3, True)])
def test_num_params_is_the_number_of_trained_parameters(declared, refused, device):
    selector = define_own_keys("own")
    selector.num_params = classmethod(lambda cls, config: declared)
    config = MemoryConfig(8, 64, 1, 4, selector="own_keys")
    message = f"^selector own_keys: has 512 trained parameters, but its num_params.* {declared}$"
    with torch.device(device):
        if refused:
            with pytest.raises(ConfigError, match=message):
                SparseMemory(config)
        else:
            assert SparseMemory(config).selector.sub_keys.device.type == device


@pytest.mark.parametrize(
    ("dtype", "gate", "losses", "message"),
    [
        (
            torch.int32,
            "none",
            False,
            r"returned blocks of dtype torch\.int32; must be torch\.int64",
        ),
        (torch.int64, "softmax", False, "returned no scores, which gates and losses need"),
        (torch.int64, "none", True, "returned no scores, which gates and losses need"),
        (torch.int64, "none", False, None),
    ],
)
def test_what_a_selector_returns_is_checked(dtype, gate, losses, message):
    class Returning(Selector):
        name = "returning"

        def forward(self, inputs):
            return Selection(torch.zeros(len(inputs.x), 1, dtype=dtype))

    memory = build(selector="returning", active_blocks=1, gate=gate)
    if message is None:
        assert memory(tokens(2)[0], losses=losses).balance_loss is None
        return
    with pytest.raises(ConfigError, match=f"^selector returning: {message}") as caught:
        memory(tokens(2)[0], losses=losses)
    assert "\n" not in str(caught.value)


def test_an_unfinished_selector_says_so():
    class Unfinished(Selector):
        name = "unfinished"

    with pytest.raises(NotImplementedError):
        build(selector="unfinished")(tokens(2)[0])
