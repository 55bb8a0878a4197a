"""``--sffn-layers``: which layers are sparse, by which selector, and in which sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq import models
from torch import Tensor, nn

from fairseq_sffn.checkpoints.stored_strings import is_plan
from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import SparseMemory
from fairseq_sffn.models.layer_plan import Entry, layer_groups, parse_plan
from fairseq_sffn.models.size import parts_of
from tests.criterions.small_criterion import criterion, reduced, sample
from tests.memory.cases import close
from tests.models import test_transformer as translation
from tests.models.small_lm import (
    FFN,
    PAD,
    SPARSE,
    build,
    dictionary,
    language_modeling,
    random_tokens,
    small_config,
    small_lm,
)

NAMED = {"pkm_4d": "pkm", "gshard_8d": "gshard"}
"""Method -> its selector, where the names differ."""


def planned(plan: str, model: str = "sffn", layers: int = 4, **options: Any) -> Any:
    return small_lm(model, decoder_layers=layers, sffn_layers=plan, **options)


# What a plan says


@pytest.mark.parametrize(
    ("plan", "entries"),
    [
        ("avgk:3", [Entry("avgk:3", "avgk", {}, 3, 3)]),
        ("avgk:0-2", [Entry("avgk:0-2", "avgk", {}, 0, 2)]),
        ("avgk:1-", [Entry("avgk:1-", "avgk", {}, 1, None)]),
        *(
            (
                f"moe/balance_rate={rate}/route_scale={scale}:0",
                [
                    Entry(
                        f"moe/balance_rate={rate}/route_scale={scale}:0",
                        "moe",
                        dict(sffn_balance_rate=0.001, sffn_route_scale=2.5),
                        *(0, 0),
                    )
                ],
            )
            for rate, scale in (("1e-3", "2.5"), ("1.E-3", "25e-1"), (".001", "2.50"))
        ),
        (
            "dense:0-1, hash_layer:2",
            [Entry("dense:0-1", "dense", {}, 0, 1), Entry("hash_layer:2", "hash_layer", {}, 2, 2)],
        ),
        (
            "avgk/block_size=8/expansion=4/active_blocks=3/gate=softmax:0",
            [
                Entry(
                    "avgk/block_size=8/expansion=4/active_blocks=3/gate=softmax:0",
                    "avgk",
                    dict(
                        sffn_block_size=8,
                        sffn_expansion=4,
                        sffn_active_blocks=3,
                        sffn_gate="softmax",
                    ),
                    *(0, 0),
                )
            ],
        ),
    ],
)
def test_entries(plan: str, entries: list[Entry]) -> None:
    assert parse_plan(plan) == entries
    assert is_plan(plan)  # so that a checkpoint with this plan loads


@pytest.mark.parametrize(
    ("plan", "sparse"),
    [
        ("hash_layer:0-1,switch:3-", {0: "hash_layer", 1: "hash_layer", 3: "switch"}),
        ("switch:3,hash_layer:0", {0: "hash_layer", 3: "switch"}),
        ("dense:0-2,switch:3", {3: "switch"}),
        ("switch:0-", dict.fromkeys(range(4), "switch")),
        ("switch:3-3", {3: "switch"}),
    ],
)
def test_each_layer_has_the_selector_of_its_entry(plan: str, sparse: dict[int, str]) -> None:
    model = planned(plan)
    found = {
        number: memory.config.selector_class.name
        for number, layer in enumerate(model.decoder.layers)
        for memory in layer.modules()
        if isinstance(memory, SparseMemory)
    }
    assert found == sparse
    names = [f"layer{number}" for number in sorted(sparse)]
    assert list(model.memory_configs) == names
    for module, config in zip(
        (m for m in model.modules() if isinstance(m, SparseMemory)),
        model.memory_configs.values(),
        strict=True,
    ):
        assert module.config is config
    assert list(model(random_tokens(2, 3))[1]["routing"]) == names


def test_sizes_of_an_entry_replace_those_of_the_model() -> None:
    plan = "avgk/block_size=4/active_blocks=2:0,avgk/expansion=2/gate=softmax:1,avgk:2,switch:3"
    options = dict(sffn_block_size=8, sffn_expansion=8, sffn_active_blocks=1, sffn_gate="sigmoid")
    configs = planned(plan, **options, avgk_exclude_bias=True).memory_configs.values()
    assert [
        (c.selector_class.name, c.block_size, c.active_blocks, c.num_cells, c.gate) for c in configs
    ] == [
        ("avgk", 4, 2, 8 * FFN, "sigmoid"),
        ("avgk", 8, 1, 2 * FFN, "softmax"),
        ("avgk", 8, 1, 8 * FFN, "sigmoid"),
        ("switch", 8, 1, 8 * FFN, "sigmoid"),
    ]
    excluded = [getattr(c.selector_options, "exclude_bias", None) for c in configs]
    assert excluded == [True, True, True, None]


def test_default_sizes_are_those_of_each_selector() -> None:
    configs = planned("gshard:0,vanilla_m:1,switch:3").memory_configs.values()
    assert [(c.block_size, c.active_blocks) for c in configs] == [
        (FFN // 2, 2),
        (1, FFN),
        (FFN, 1),
    ]
    assert [c.gate_name for c in configs] == ["renormalized", "none", "softmax"]


@pytest.mark.parametrize(("kept", "built"), [("1,3", {1: 0, 3: 1}), ("0,2", {0: 0}), ("2", {})])
def test_kept_layers_keep_their_entries(kept: str, built: dict[int, int]) -> None:
    """``built`` maps the number in training to the index in the pruned model."""
    plan = "hash_layer:0,avgk/block_size=8:1,switch:3"
    whole = planned(plan).eval()
    config = small_config("sffn", decoder_layers=4, sffn_layers=plan, decoder_layers_to_keep=kept)
    pruned = build(config).double().eval()
    assert list(pruned.memory_configs) == [f"layer{number}" for number in built]
    assert pruned.decoder.sparse_layers == {i: f"layer{number}" for number, i in built.items()}
    pruned.load_state_dict(whole.state_dict(), model_cfg=config)
    batch = random_tokens(2, 5)
    actual, extra = pruned(batch)
    whole.decoder.layers = nn.ModuleList(whole.decoder.layers[int(n)] for n in kept.split(","))
    whole.decoder.sparse_layers = pruned.decoder.sparse_layers
    close(actual, whole(batch)[0])
    assert list(extra["routing"]) == list(pruned.memory_configs)
    loss, _, log = criterion()(pruned, sample(5, 3))
    assert loss.isfinite() and ("routing_counts_layer3" in log) == (3 in built)


# A uniform plan


def state(model: nn.Module, losses: bool = True) -> tuple[dict[str, Tensor], Tensor, Any, Any]:
    """Return weights, output, routing and gradients of a pass of a model."""
    torch.manual_seed(2)
    output, extra = model(random_tokens(3, 8), routing_losses=losses)
    loss = output.square().mean()
    for layer in extra["routing"].values():
        loss = loss + layer.balance_loss + 0.1 * layer.z_loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return model.state_dict(), output, extra["routing"], grads


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("by_name", [True, False], ids=["named", "sffn"])
def test_a_uniform_plan_is_the_model_without_a_plan(method: str, by_name: bool) -> None:
    selector, sizes = NAMED.get(method, method), ("sffn_block_size", "sffn_active_blocks")
    options = {} if by_name else {name: small_config(method)[name] for name in sizes}
    found = []
    for own in (
        {} if by_name else dict(sffn_selector=selector),
        dict(sffn_layers=f"{selector}:1,{selector}:3"),
    ):
        torch.manual_seed(1)
        model = small_lm(method if by_name else "sffn", decoder_layers=4, **own, **options)
        outcome = state(model)
        torch.manual_seed(3)
        loss, _, log = criterion(log_format="json")(model, sample(5, 3))
        found.append((model.memory_configs, [*outcome, loss], reduced([log])))
    (configs, outcome, logged), (planned_configs, planned_outcome, planned_logged) = found
    assert planned_configs == configs and list(planned_configs) == ["layer1", "layer3"]
    assert planned_logged == logged
    torch.testing.assert_close(planned_outcome, outcome, rtol=0, atol=0)
    assert list(planned_outcome[0]) == list(outcome[0])  # the parameters in the same order


# Layers that differ, in one pass


class Seen:
    """Records the token ids that the selectors of a model read: name of the selector -> (N, T)."""

    def __init__(self, model: nn.Module) -> None:
        self.ids: dict[str, Tensor | None] = {}
        for memory in model.modules():
            if isinstance(memory, SparseMemory):
                name = memory.config.selector_class.name
                memory.selector.register_forward_pre_hook(
                    lambda _, args, name=name: self.ids.update({name: args[0].token_ids})
                )


@pytest.mark.parametrize("step_by_step", [False, True])
def test_each_layer_reads_as_many_token_ids_as_it_needs(step_by_step: bool) -> None:
    plan = "avgk/block_size=8:0,hash_layer:1,rand_hash/block_size=8:2"
    model = planned(plan, hash_table="bigram").eval()
    seen, batch = Seen(model), random_tokens(2, 5)
    if step_by_step:
        cache: dict[str, Any] = {}
        for end in range(1, 6):
            model.decoder(batch[:, :end], incremental_state=cache)
        expected = [[(row[3], row[4]) for row in batch.tolist()]]
    else:
        model(batch)
        rows = [[PAD, *row] for row in batch.tolist()]
        expected = [[(row[t], row[t + 1]) for row in rows] for t in range(5)]
    pairs = torch.tensor(expected).view(-1, 2)
    assert seen.ids["avgk"] is None
    assert torch.equal(seen.ids["hash_layer"], pairs)
    assert torch.equal(seen.ids["rand_hash"], pairs[:, 1:])


def test_counts_have_the_number_of_blocks_of_each_layer() -> None:
    model = planned("switch:0,avgk/block_size=4:1,avgk/block_size=8/expansion=2:3")
    routing = model(random_tokens(2, 3))[1]["routing"]
    assert [len(layer.counts) for layer in routing.values()] == [16, 16 * FFN // 4, 2 * FFN // 8]
    used = [layer.counts.sum() for layer in routing.values()]
    assert used == [6, 6 * FFN // 4, 6 * FFN // 8]


def test_layerdrop_skips_layers_that_differ() -> None:
    model = small_lm("mixed", decoder_layerdrop=0.5)
    patterns = set()
    for _ in range(20):
        routing = model(random_tokens(2, 3), routing_losses=True)[1]["routing"]
        assert [len(layer.counts) for layer in routing.values()] == [16, 64, 16]
        patterns.add(tuple(bool(layer.counts.any()) for layer in routing.values()))
    assert len(patterns) > 2


# Sizes


def test_the_tables_of_all_layers_count() -> None:
    """Rank 0 of 2 keeps half of each table, and draws the largest table as a whole."""
    plan = "switch/expansion=4:0,lorkm:1,hash_layer/expansion=8:2-3"
    args = small_config("sffn", decoder_layers=4, sffn_layers=plan)
    parts = {part.name: part for part in parts_of(args, language_modeling())}
    table = FFN * 16
    assert parts["tables"].params == (2 * 4 + 16 + 2 * 2 * 8) * table
    assert parts["dense FFNs"].params == 0
    args.sffn_expert_parallel = 2
    parts = {part.name: part for part in parts_of(args, language_modeling())}
    assert parts["tables"].params == (2 * 4 + 16 + 2 * 2 * 8) * table // 2 + 16 * table
    args.sffn_expert_parallel, args.decoder_layers_to_keep = 1, "3,0"
    parts = {part.name: part for part in parts_of(args, language_modeling())}
    assert parts["tables"].params == (2 * 4 + 2 * 8) * table
    assert parts["dense FFNs"].params == 0


def test_layers_of_an_impossible_model_are_counted_not_listed() -> None:
    args = small_config("sffn", decoder_layers=10**12, sffn_layers="switch:1-")
    (group,) = layer_groups(args, "decoder")
    assert len(group.numbers) == 10**12 - 1
    with pytest.raises(UsageError, match=r"^--decoder-layers 10+: its tables take "):
        models.build_model(args, language_modeling())


# Encoder-decoder


def test_a_plan_holds_for_both_sides() -> None:
    plan = "hash_layer:0,avgk/block_size=8:2-"
    options = dict(encoder_layers=3, decoder_layers=4, sffn_layers=plan)
    model = translation.build(None, sffn_block_size=None, **options)
    assert {name: c.selector_class.name for name, c in model.memory_configs.items()} == {
        "encoder_layer0": "hash_layer",
        "encoder_layer2": "avgk",
        "decoder_layer0": "hash_layer",
        "decoder_layer2": "avgk",
        "decoder_layer3": "avgk",
    }
    _, extra = translation.call(model, random_tokens(2, 3), random_tokens(2, 4))
    assert list(extra["routing"]) == list(model.memory_configs)


def test_a_plan_must_fit_both_sides() -> None:
    task = translation.Task(dictionary(), dictionary())
    told = r"^--sffn-layers switch:2: layer 2 is not one of 0 to 1 of --decoder-layers 2$"
    with pytest.raises(UsageError, match=told):
        models.build_model(translation.config(sffn_layers="switch:2", encoder_layers=3), task)
    named = translation.config("transformer_avgk", sffn_layers="switch:0")
    with pytest.raises(UsageError, match="use --arch transformer_sffn to choose"):
        models.build_model(named, task)
