"""The losses and measures of routing that a training logs."""

from pathlib import Path

import pytest

from tests import commands
from tests.commands import losses, records
from tests.integration.outputs import logged, valid_ppl


@pytest.mark.parametrize("model", commands.MODELS)
def test_losses_are_those_of_cross_entropy(model: str, data_bin: Path, tmp_path: Path) -> None:
    ours = commands.train(data_bin, tmp_path / "ours", model, "--balance-loss-weight", "0")
    plain = commands.train(data_bin, tmp_path / "plain", model, "--criterion", "cross_entropy")
    keys = ("num_updates", "loss", "ppl", "gnorm", "wpb", "bsz")
    assert logged(ours, *keys) == logged(plain, *keys)
    assert valid_ppl(ours) == valid_ppl(plain)


@pytest.mark.parametrize("flag", ["--balance-loss-weight", "--z-loss-weight"])
def test_extra_losses_train_but_stay_out_of_the_logged_loss(
    flag: str, data_bin: Path, tmp_path: Path
) -> None:
    without, with_extra = (
        losses(commands.train(data_bin, tmp_path / weight, "switch", flag, weight))
        for weight in ("0", "1")
    )
    assert with_extra[1] == without[1] and with_extra[6] != without[6]


def test_mean_over_two_layers_is_half_their_sum(data_bin: Path, tmp_path: Path) -> None:
    flags = ("--sffn-freq", "1", "--balance-loss-reduce")
    total = ("sum", "--balance-loss-weight", "1")
    mean = ("mean", "--balance-loss-weight", "2")
    logs = [
        commands.train(data_bin, tmp_path / reduce[0], "switch", *flags, *reduce)
        for reduce in (total, mean)
    ]
    assert logged(logs[0], "loss", "gnorm") == logged(logs[1], "loss", "gnorm")


METRICS = ("balance_loss", "load_entropy", "load_max", "unused_blocks", "dropped_share")


def test_json_log_has_every_layer(data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "switch", "--sffn-freq", "1")
    for record in (records(log)[-1], records(log, "valid")[-1], records(log, "train")[-1]):
        plain = {name.removeprefix("valid_").removeprefix("train_") for name in record}
        assert {f"{m}{layer}" for m in METRICS for layer in ("", "_layer0", "_layer1")} <= plain


@pytest.mark.parametrize("log_format", ["simple", "none"])
def test_other_logs_have_means_only(log_format: str, data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "switch", "--log-format", log_format)
    assert all(metric in log for metric in METRICS) or log_format == "none"
    assert "_layer1" not in log


def test_tensorboard_has_every_layer(data_bin: Path, tmp_path: Path) -> None:
    board = ("--tensorboard-logdir", tmp_path / "board", "--log-format", "simple")
    commands.train(data_bin, tmp_path / "ckpt", "switch", *board)
    for split in ("train", "train_inner", "valid"):
        (events,) = (tmp_path / "board" / split).iterdir()
        assert all(f"{metric}_layer1".encode() in events.read_bytes() for metric in METRICS)


def test_dropped_tokens_are_logged(data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "switch", "--sffn-capacity-factor", "1.0")
    assert all(0 < float(record["dropped_share"]) < 1 for record in records(log))
    assert records(log, "valid")[-1]["valid_dropped_share"] == "0"


def test_divergence_is_reported_as_fairseq_does(data_bin: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        commands.train(data_bin, tmp_path, "avgk", "--lr", "1e20", "--max-update", "10")
