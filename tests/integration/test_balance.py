"""Loss-free bias and the scopes of the balance loss, through fairseq's commands and trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.trainer import Trainer
from torch import Tensor

from tests import commands
from tests.models.small_lm import random_tokens, small_lm

pytestmark = pytest.mark.usefixtures("quick_start")
BIAS = "decoder.layers.1.fc1.memory.balancer.bias"
RATED = ("--sffn-balance-rate", "0.25", "--dropout", "0")
MODELS = ("avgk", "vanilla_m", "lorkm", "pkm", "pkm_ffn", "switch", "gshard")


def state(save_dir: Path) -> dict[str, Any]:
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)["model"]


@pytest.mark.parametrize("model", MODELS)
def test_the_bias_after_an_update_of_one_or_many_micro_batches(
    model: str, data_bin: Path, tmp_path: Path
) -> None:
    """The first update has a whole epoch. It moves each bias by one step."""
    biases = []
    for size, more in (("1000", ()), ("30", ()), ("30", ("--checkpoint-activations",))):
        save_dir = tmp_path / str(len(biases))
        flags = ("--batch-size", size, "--update-freq", "100", "--max-update", "1", *more)
        commands.train(data_bin, save_dir, model, *RATED, *flags)
        biases.append(state(save_dir)[BIAS])
    assert len(biases[0].abs().unique()) == 1 + (biases[0] == 0).any()
    for bias in biases[1:]:
        torch.testing.assert_close(bias, biases[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("model", ["avgk", "switch"])
def test_a_training_with_biases_resumes_exactly(model: str, data_bin: Path, tmp_path: Path) -> None:
    flags = ("--sffn-balance-rate", "0.05", "--update-freq", "3", "--checkpoint-activations")
    whole = commands.train(data_bin, tmp_path / "whole", model, *flags)
    parts = commands.train(data_bin, tmp_path / "parts", model, *flags, "--max-update", "3")
    parts += commands.train(data_bin, tmp_path / "parts", model, *flags)
    assert commands.losses(parts) == commands.losses(whole)
    torch.testing.assert_close(state(tmp_path / "parts"), state(tmp_path / "whole"), rtol=0, atol=0)
    assert state(tmp_path / "whole")[BIAS].any()
    ranges = [float(record["bias_range"]) for record in commands.records(whole)]
    assert ranges[0] == 0 < min(ranges[1:])


class Pretended:
    """A trainer whose update is one forward and backward pass of the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = small_lm("switch", sffn_balance_rate=0.25, sffn_freq=1).train()
        self.trainer = Trainer.__new__(Trainer)
        self.trainer.cfg = FairseqConfig()
        self.trainer._model = self.trainer._wrapped_model = self.model
        self.trainer._criterion = self.trainer._wrapped_criterion = torch.nn.Identity()
        self.trainer._num_updates, self.trainer.writer = 0, None
        self.trainer.interruption = None
        self.batch = random_tokens(3, 8)
        self.succeeds: list[bool] = []
        monkeypatch.setattr(Trainer, "train_step", self.step)
        monkeypatch.setattr(Trainer, "data_parallel_world_size", 1)
        monkeypatch.setattr(Trainer, "criterion", self.trainer._criterion)

    def step(self, samples: Any, raise_oom: bool = False) -> Any:
        self.model(self.batch)[0].sum().backward()
        if self.succeeds.pop(0):
            self.trainer._num_updates += 1
        elif self.succeeds:  # as fairseq does with --amp: the same batch with a smaller scale
            return self.trainer.train_step(samples)

    def biases(self) -> list[Tensor]:
        return [layer.fc1.memory.balancer.bias.clone() for layer in self.model.decoder.layers]


@pytest.mark.parametrize(
    ("succeeds", "moves"), [([True], True), ([False], False), ([False, False, True], True)]
)
def test_an_update_that_overflows_moves_no_bias(
    succeeds: list[bool], moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = Pretended(monkeypatch)
    pretended.succeeds = list(succeeds)
    pretended.trainer.train_step([])
    for bias in pretended.biases():
        assert set(bias.abs().tolist()) <= ({0.0, 0.25} if moves else {0.0})
        assert bias.any() == moves


def test_the_loads_of_an_update_that_overflowed_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def biases(*batches: Tensor) -> list[Tensor]:
        """Return the biases after updates of which only the last one is made."""
        torch.manual_seed(1)
        pretended = Pretended(monkeypatch)
        for batch in batches:
            pretended.batch, pretended.succeeds = batch, [batch is batches[-1]]
            pretended.trainer.train_step([])
        return pretended.biases()

    large, small = random_tokens(8, 8), random_tokens(1, 8)
    assert all(map(torch.equal, biases(large, small), biases(small)))
    assert not all(map(torch.equal, biases(torch.cat([large, small])), biases(small)))


@pytest.mark.parametrize("model", ["avgk", "pkm", "gshard"])
def test_scopes_of_the_balance_loss(model: str, data_bin: Path, tmp_path: Path) -> None:
    """With one micro-batch in an update, the global loss is that of the micro-batch. With one
    sentence in a micro-batch, the loss of a sequence is."""

    def train(scope: str, *flags: str) -> dict[int, str]:
        save_dir = tmp_path / "-".join((scope, *flags))
        flags = (*flags, "--balance-loss-weight", "0.5", "--balance-loss-scope", scope)
        log = commands.train(data_bin, save_dir, model, *flags)
        return {r["num_updates"]: (r["loss"], r["balance_loss"]) for r in commands.records(log)}

    micro = train("micro")
    assert train("global") == micro
    assert train("sequence") != micro
    parts = ("--update-freq", "3")
    assert train("global", *parts) != train("micro", *parts)
    assert train("sequence", "--batch-size", "1") == train("micro", "--batch-size", "1")


@pytest.mark.parametrize("model", ["avgk", "moe", "hash_layer"])
def test_a_scope_without_a_balance_loss(model: str, data_bin: Path, tmp_path: Path) -> None:
    flags = ("--balance-loss-scope", "global")
    assert commands.refusal(lambda: commands.train(data_bin, tmp_path, model, *flags)) == (
        "--balance-loss-scope global: no balance loss has a weight; see --balance-loss-weight"
    )


def test_an_earlier_name_of_the_flag(data_bin: Path, tmp_path: Path) -> None:
    line = commands.refusal(
        lambda: commands.train(data_bin, tmp_path, "avgk", "--avgk-balance-rate", "0.1")
    )
    assert line.endswith(
        "--avgk-balance-rate 0.1: is --sffn-balance-rate today, for every selector that scores "
        "blocks"
    )


def test_a_checkpoint_with_earlier_names(data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, "avgk", "--sffn-balance-rate", "0.1", "--store-ema")
    path = tmp_path / "checkpoint_last.pt"
    saved = torch.load(path, weights_only=True)
    options = saved["cfg"]["model"]
    options["avgk_balance_rate"] = options.pop("sffn_balance_rate")
    for tensors in (saved["model"], saved["extra_state"]["ema"]):
        tensors["decoder.layers.1.fc1.memory.selector.balance_bias"] = tensors.pop(BIAS)
    old = tmp_path / "old.pt"
    torch.save(saved, old)
    assert commands.evaluate(data_bin, old) == commands.evaluate(data_bin, path)
    longer = ("--sffn-balance-rate", "0.1", "--store-ema", "--max-update", "8")
    resumed = commands.train(data_bin, tmp_path / "of", "avgk", *longer, "--restore-file", str(old))
    assert commands.losses(resumed) == commands.losses(
        commands.train(data_bin, tmp_path, "avgk", *longer)
    )
    averages = [
        torch.load(folder / "checkpoint_last.pt", weights_only=True)["extra_state"]["ema"]
        for folder in (tmp_path / "of", tmp_path)
    ]
    torch.testing.assert_close(*averages, rtol=0, atol=0)
