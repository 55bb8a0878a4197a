"""Errors and warnings once model and criterion are known."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fairseq_sffn.errors import UsageError
from fairseq_sffn.models.plugin_model import plugin_model_in
from fairseq_sffn.patches.checks import check_options, check_value_lr_scale
from tests import commands
from tests.models.small_lm import small_lm

SHORT = ("--max-update", "1", "--no-save")
SMOOTHED = ("--criterion", "sffn_label_smoothed_cross_entropy", "--label-smoothing", "0.1")
ADAPTIVE = ("--no-share-decoder-input-output-embed", "--adaptive-softmax-cutoff", "10,20")


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (
            *("base", "--sffn-gate none"),
            "--sffn-gate none: leaves the router of base .* add --balance-loss-weight$",
        ),
        ("pkm_ffn", "--sffn-gate none", "leaves the router of pkm_ffn without a gradient"),
        (
            *("switch", "--balance-loss-weight 0 --sffn-gate renormalized"),
            "--sffn-gate renormalized: leaves the router of switch",
        ),
        (
            "switch",
            "--balance-loss-weight 0 --sffn-gate renormalized --sffn-active-blocks 2 "
            "--sffn-shared-blocks 1",
            "leaves the router of switch .* only block beside --sffn-shared-blocks 1 weighs 1; ",
        ),
        (
            *("switch", "--criterion cross_entropy --sffn-gate none"),
            "add --balance-loss-weight and --criterion sffn_cross_entropy$",
        ),
        (
            *("moe", "--sffn-active-blocks 1"),
            "^--sffn-gate sigmoid_renormalized: leaves the router of moe without a gradient where "
            "no balance loss has a weight, as a token's only block weighs 1; choose another gate, "
            "or add --balance-loss-weight$",
        ),
        (
            *("hash_moe", "--sffn-gate none"),
            "--sffn-gate none: leaves the router of hash_moe .*; choose another gate$",
        ),
        (
            *("hash_moe", "--balance-loss-weight 0.1"),
            "^--balance-loss-weight 0.1: hash_moe selects by a fixed table",
        ),
        ("avgk", "--sffn-route-scale 2", "^--sffn-route-scale 2.0: .* the gate is none$"),
        ("moe", "--sffn-route-scale nan", "^--sffn-route-scale nan: must be positive and finite$"),
        ("avgk", "--avgk-key-ema 1", "^--avgk-key-ema 1.0: must be at least 0 and below 1$"),
        ("sigma_moe", "--sigma-moe-expert-dropout 1", "^--sigma-moe-expert-dropout 1.0: must be"),
        ("aoe", "--aoe-rank 17", "^--aoe-rank 17: is not 1 to 16, the smaller of block size and"),
        ("hash_layer", "--balance-loss-weight 0.1", "--balance-loss-weight 0.1: hash_layer gives"),
        ("rand_hash", "--z-loss-weight 0.1", "--z-loss-weight 0.1: rand_hash gives"),
        (
            *("mixed", "--sffn-layers hash_layer:0,rand_hash/block_size=8:1 --z-loss-weight 0.1"),
            "--z-loss-weight 0.1: hash_layer and rand_hash give blocks no score",
        ),
        (
            *("mixed", "--sffn-layers hash_layer:0,switch:1,base/gate=none:2"),
            "--sffn-gate none: leaves the router of base .* add --balance-loss-weight$",
        ),
        *(
            (
                *("avgk", f"--sffn-value-lr-scale 2 --optimizer {optimizer}"),
                f"^--sffn-value-lr-scale 2.0: not with --optimizer {optimizer}; it needs steps",
            )
            for optimizer in ("sgd", "nag", "adafactor --scale-parameter")
        ),
        ("avgk", "--decoder-layers-to-keep 0,1", "--decoder-layers-to-keep 0,1: is for a trained"),
        ("dense", "--decoder-layers-to-keep 0", "--decoder-layers-to-keep 0: is for a trained"),
        ("avgk", " ".join((*SMOOTHED, *ADAPTIVE)), "not with --adaptive-softmax-cutoff"),
        ("dense", " ".join((*SMOOTHED, *ADAPTIVE)), "not with --adaptive-softmax-cutoff"),
        (
            *("avgk", "--task sffn_language_modeling --hash-counts train"),
            "--hash-counts train: is for models with --hash-table balanced",
        ),
    ],
)
def test_refused(model: str, flags: str, message: str, data_bin: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        commands.train(data_bin, tmp_path, model, *SHORT, *flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("base", "--sffn-gate none --balance-loss-weight 0.1"),
        ("pkm_ffn", "--sffn-gate none --z-loss-weight 0.1"),
        ("moe", "--sffn-active-blocks 1 --sffn-gate sqrt_softplus --sffn-route-scale 1.5"),
        ("sigma_moe", "--sffn-gate none"),  # it has its own balance loss
        ("hash_moe", "--sffn-gate sigmoid --z-loss-weight 0.1"),
        ("hash_moe", "--task sffn_language_modeling --hash-counts train"),
        ("aoe", "--sffn-gate none"),  # it has no router
        ("switch", "--sffn-gate none"),  # it has its own balance loss
        ("switch", "--balance-loss-weight 0"),
        ("mixed", "--sffn-layers hash_layer:0,switch/gate=none:1"),
        ("mixed", "--balance-loss-weight 0.1"),  # for the layers with scores
        ("gshard", "--balance-loss-weight 0 --sffn-gate renormalized"),  # it has two blocks
        ("lorkm", "--sffn-gate none"),  # its keys are also those of the cells
        ("avgk", "--sffn-gate none --criterion cross_entropy"),
        ("dense", " ".join(ADAPTIVE)),
        ("avgk", "--sffn-value-lr-scale 1 --optimizer sgd"),
        *(
            ("avgk", f"--sffn-value-lr-scale 2 --optimizer {optimizer}")
            for optimizer in ("adam", "adamax", "adagrad", "adadelta", "adafactor", "sffn_adam")
        ),
    ],
)
def test_not_refused(model: str, flags: str, data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, model, *SHORT, *flags.split())
    assert list(commands.losses(log)) == [1]


def test_quantization_is_for_models_without_sparse_layers() -> None:
    cfg = SimpleNamespace(
        common=SimpleNamespace(quantization_config_path="q.yaml"),
        model=SimpleNamespace(),
        optimizer=None,
    )
    check_options(cfg, small_lm("dense"))
    with pytest.raises(UsageError, match=r"^--quantization-config-path q\.yaml: "):
        check_options(cfg, small_lm("avgk"))


@pytest.mark.parametrize("options", [SimpleNamespace(_name="lamb"), None])
def test_the_factor_of_value_steps_is_not_for_lamb(options: Any) -> None:
    """LAMB itself needs a GPU."""
    check_value_lr_scale(options, small_lm("avgk"))
    model = small_lm("avgk", sffn_value_lr_scale=2.0)
    if options is None:
        check_value_lr_scale(options, model)
        return
    with pytest.raises(
        UsageError, match=r"^--sffn-value-lr-scale 2\.0: not with --optimizer lamb;"
    ):
        check_value_lr_scale(options, model)


def test_a_wrapped_model_is_found() -> None:
    model = small_lm("avgk")
    assert plugin_model_in(nn.Sequential(model)) is plugin_model_in(model) is model
    assert plugin_model_in(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("model", "criterion", "warned"),
    [
        ("switch", "cross_entropy", True),
        ("switch", "sffn_cross_entropy", False),
        ("mixed", "cross_entropy", True),
        ("avgk", "cross_entropy", False),
        ("dense", "cross_entropy", False),
    ],
)
def test_a_criterion_without_the_balance_loss_is_warned_of(
    model: str, criterion: str, warned: bool, data_bin: Path, tmp_path: Path, caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        commands.train(data_bin, tmp_path, model, *SHORT, "--criterion", criterion)
    assert ("trains switch without its balance loss" in caplog.text) == warned
