"""Errors and warnings once model and criterion are known."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fairseq_sffn.errors import UsageError
from fairseq_sffn.models.plugin_model import plugin_model_in
from fairseq_sffn.patches.checks import check_options
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
            "--sffn-gate renormalized: leaves the router of switch",
        ),
        (
            *("switch", "--criterion cross_entropy --sffn-gate none"),
            "add --balance-loss-weight and --criterion sffn_cross_entropy$",
        ),
        ("hash_layer", "--balance-loss-weight 0.1", "--balance-loss-weight 0.1: hash_layer gives"),
        ("rand_hash", "--z-loss-weight 0.1", "--z-loss-weight 0.1: rand_hash gives"),
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
        ("switch", "--sffn-gate none"),  # it has its own balance loss
        ("switch", "--balance-loss-weight 0"),
        ("gshard", "--balance-loss-weight 0 --sffn-gate renormalized"),  # it has two blocks
        ("lorkm", "--sffn-gate none"),  # its keys are also those of the cells
        ("avgk", "--sffn-gate none --criterion cross_entropy"),
        ("dense", " ".join(ADAPTIVE)),
    ],
)
def test_not_refused(model: str, flags: str, data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, model, *SHORT, *flags.split())
    assert list(commands.losses(log)) == [1]


def test_quantization_is_for_models_without_sparse_layers() -> None:
    cfg = SimpleNamespace(
        common=SimpleNamespace(quantization_config_path="q.yaml"), model=SimpleNamespace()
    )
    check_options(cfg, small_lm("dense"))
    with pytest.raises(UsageError, match=r"^--quantization-config-path q\.yaml: "):
        check_options(cfg, small_lm("avgk"))


def test_a_wrapped_model_is_found() -> None:
    model = small_lm("avgk")
    assert plugin_model_in(nn.Sequential(model)) is plugin_model_in(model) is model
    assert plugin_model_in(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("model", "criterion", "warned"),
    [
        ("switch", "cross_entropy", True),
        ("switch", "sffn_cross_entropy", False),
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
