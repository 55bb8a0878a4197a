"""Values of ``--sffn-layers`` that are refused, and options that it contradicts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fairseq_sffn.errors import UsageError
from tests.models.small_lm import small_lm
from tests.models.test_layer_plan import planned


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("", "--sffn-layers '': has an empty entry"),
        ("switch:0,", "--sffn-layers switch:0,: has an empty entry"),
        ("switch:0,,switch:1", "--sffn-layers switch:0,,switch:1: has an empty entry"),
        *(
            (entry, f"--sffn-layers {entry}: is not of the form SELECTOR[/OPTION=VALUE...]:LAYERS")
            for entry in (
                "switch",
                "switch:",
                ":0",
                f"switch:{'9' * 5000}",
                "switch:x",
                "switch:-1",
                "switch:0:1",
            )
        ),
        ("switch/:0", "--sffn-layers switch/:0: is not of the form"),
        ("switch:0-1-2", "--sffn-layers switch:0-1-2: is not of the form"),
        ("switch:0.5", "--sffn-layers switch:0.5: is not of the form"),
        ("moe5:0", "--sffn-layers moe5:0: moe5 is none of dense, aoe, avgk, "),
        ("switch:0,moe5:1", "--sffn-layers moe5:1: moe5 is none of dense, aoe, avgk, "),
        (
            "dense/block_size=8:0",
            "--sffn-layers dense/block_size=8:0: dense layers take no options",
        ),
        ("dense:0-", "--sffn-layers dense:0-: has no sparse layer"),
        ("avgk/size=8:0", "--sffn-layers avgk/size=8:0: size is none of block_size, "),
        (
            "avgk/block_size=8/block_size=8:0",
            "--sffn-layers avgk/block_size=8/block_size=8:0: gives block_size twice",
        ),
        ("avgk/block_size:0", "--sffn-layers avgk/block_size:0: block_size '' is not a whole "),
        ("avgk/expansion=x:0", "--sffn-layers avgk/expansion=x:0: expansion x is not a whole numb"),
        ("avgk/expansion=1.5:0", "--sffn-layers avgk/expansion=1.5:0: expansion 1.5 is not a "),
        ("switch:2-1", "--sffn-layers switch:2-1: the last layer is before the first"),
        ("switch:4", "--sffn-layers switch:4: layer 4 is not one of 0 to 3 of --decoder-layers 4"),
        ("switch:4-", "--sffn-layers switch:4-: layer 4 is not one of 0 to 3 of "),
        ("switch:1-9", "--sffn-layers switch:1-9: layer 9 is not one of 0 to 3 of "),
        ("dense:4,switch:0", "--sffn-layers dense:4: layer 4 is not one of 0 to 3 of "),
        ("switch:0-2,base:2-3", "--sffn-layers base:2-3: layer 2 is also in the entry switch:0-2"),
        ("base:2,switch:0-", "--sffn-layers base:2: layer 2 is also in the entry switch:0-"),
        ("dense:0-,switch:1", "--sffn-layers switch:1: layer 1 is also in the entry dense:0-"),
        (
            "avgk/block_size=48:0",
            "--sffn-layers avgk/block_size=48:0: --sffn-block-size 48: does not divide",
        ),
        ("avgk/block_size=0:0", "--sffn-layers avgk/block_size=0:0: --sffn-block-size 0: must be"),
        ("switch/expansion=-1:0", "--sffn-layers switch/expansion=-1:0: --sffn-expansion -1: must"),
        (
            "switch/active_blocks=17:0",
            "--sffn-layers switch/active_blocks=17:0: --sffn-active-blocks 17: .* 16 blocks",
        ),
        (
            "switch/gate=hard:0",
            "--sffn-layers switch/gate=hard:0: --sffn-gate hard: is none of none, softmax",
        ),
        (
            "hash_layer/balance_rate=0.1:0",
            "--sffn-layers hash_layer/balance_rate=0.1:0: --sffn-balance-rate 0.1: hash_layer sel",
        ),
        ("moe/balance_rate=x:0", "--sffn-layers moe/balance_rate=x:0: balance_rate x is not a num"),
        ("moe/route_scale=:0", "--sffn-layers moe/route_scale=:0: route_scale '' is not a number"),
        (
            "hash_layer/gate=softmax:0",
            "--sffn-layers hash_layer/gate=softmax:0: --sffn-gate softmax: hash_layer gives",
        ),
        ("avgk:0", "--sffn-layers avgk:0: --sffn-block-size 64: the default of avgk, does not"),
        (
            "switch/expansion=1000000000000:0",
            "--sffn-layers switch/expansion=1000000000000:0: its tables take .* in fp32",
        ),
    ],
)
def test_a_plan_with_a_fault_is_refused_in_one_line(plan: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(plan)
    line = str(caught.value)
    head, _, pattern = told.partition(": ")
    assert line.startswith(f"{head}: ") and "\n" not in line
    assert re.match(re.escape(pattern).replace(r"\.\*", ".*"), line.removeprefix(f"{head}: ")), line


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        (
            *("sffn", dict(sffn_layers="avgk:0,base:1", sffn_freq=1)),
            "--sffn-freq 1: --sffn-layers avgk:0,base:1 says already which layers are sparse",
        ),
        (
            *("avgk", dict(sffn_layers="avgk:0,switch:1")),
            "--sffn-layers switch:1: this model selects by avgk; use --arch transformer_lm_sffn to",
        ),
        (
            *("sffn", dict(sffn_layers="avgk:0,switch:1", sffn_selector="avgk")),
            "--sffn-layers switch:1: --sffn-selector avgk is for all layers; leave it out",
        ),
        (
            *("sffn", dict(sffn_layers="avgk:0,switch:1", hash_table="balanced")),
            "--hash-table balanced: is for the selector hash_layer, but this model selects by avgk "
            "and switch",
        ),
        (
            *("sffn", dict(sffn_layers="switch:0,hash_layer:1", sffn_gate="sigmoid")),
            "--sffn-layers hash_layer:1: --sffn-gate sigmoid: hash_layer gives blocks no score",
        ),
        (
            *("sffn", dict(sffn_layers="switch:0,vanilla_m:1", sffn_expert_parallel=2)),
            "--sffn-layers vanilla_m:1: --sffn-expert-parallel 2: vanilla_m scores every key",
        ),
        (
            *("sffn", dict(sffn_layers="switch:0,avgk:1", sffn_block_size=48)),
            "--sffn-layers switch:0: --sffn-block-size 48: does not divide",
        ),
        ("sffn", {}, "--sffn-selector: is required by this model, or --sffn-layers"),
    ],
)
def test_options_that_contradict_a_plan(model: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(told)}"):
        small_lm(model, **options)


def test_a_plan_with_the_default_frequency_is_not_refused() -> None:
    """fairseq's namespaces hold defaults too."""
    model = small_lm("sffn", sffn_layers="switch:0", sffn_freq=2)
    assert list(model.memory_configs) == ["layer0"]
    # The plan needs no valid frequency: this model has one layer.
    assert list(planned("switch:0", layers=1).memory_configs) == ["layer0"]


def test_selector_and_plan_may_agree() -> None:
    model = small_lm("sffn", sffn_layers="switch:0,dense:1", sffn_selector="switch")
    assert list(model.memory_configs) == ["layer0"]
