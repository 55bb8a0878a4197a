"""``--amp`` trains with the gradients of the unscaled loss. A CPU has a GradScaler too."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import optim
from omegaconf import OmegaConf

from fairseq_sffn.optim.amp_optimizer import AMPOptimizer
from fairseq_sffn.patches import trainer
from fairseq_sffn.patches.trainer_steps import StepTrainer
from tests import commands

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0},
    "adam": {"adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "use_old_adam": False},
    "sffn_adam": {"adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "use_old_adam": False},
}
SCALE = 128


def configuration(name: str) -> Any:
    rest = {"weight_decay": 0.0, "fp16_adam_stats": False, "tpu": False}
    return OmegaConf.create(
        {
            "common": {"fp16_init_scale": SCALE, "min_loss_scale": 1e-4},
            "optimizer": {"_name": name, "lr": [0.1], **rest, **OPTIMIZERS[name]},
        }
    )


@pytest.fixture(autouse=True)
def scaler_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = functools.partial(torch.amp.GradScaler, "cpu")
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", scaler)


def loss_of(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.square() * torch.arange(1.0, 5.0)).sum()


@pytest.mark.parametrize("clip_norm", [None, 0.0, 1.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_without_a_scale(name: str, clip_norm: float | None) -> None:
    mixed, plain = (torch.nn.Parameter(torch.linspace(0.5, 2.0, 4)) for _ in range(2))
    cfg = configuration(name)
    amp, exact = (
        AMPOptimizer.build_optimizer(cfg, [mixed]),
        optim.build_optimizer(cfg.optimizer, [plain]),
    )
    for _ in range(3):
        norms = []
        for optimizer, parameter in ((amp, mixed), (exact, plain)):
            optimizer.zero_grad()
            optimizer.backward(loss_of(parameter))
            if clip_norm is not None:
                norms.append(optimizer.clip_grad_norm(clip_norm))
            optimizer.step()
        torch.testing.assert_close(norms[:1], norms[1:])
        torch.testing.assert_close(mixed.grad, plain.grad)
        torch.testing.assert_close(mixed, plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_changes_the_scale_alone(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = AMPOptimizer.build_optimizer(configuration(name), [parameter])
    optimizer.backward(loss_of(parameter) * torch.inf)
    optimizer.clip_grad_norm(0.0)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4))
    assert optimizer.scaler.get_scale() == SCALE / 2
    optimizer.zero_grad()
    optimizer.backward(loss_of(parameter))
    optimizer.clip_grad_norm(0.0)
    optimizer.step()
    torch.testing.assert_close(parameter.grad, 2 * torch.arange(1.0, 5.0))


@pytest.mark.parametrize("amp", [True, False])
def test_validation_computes_as_training_does(amp: bool) -> None:
    seen = []

    class Seen(Exception):
        pass

    class Model:
        def eval(self) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))
            raise Seen

    class WithoutModel(StepTrainer):
        model = Model()

        def __init__(self) -> None:
            self.tpu, self.device = False, torch.device("cpu")
            common, ema = SimpleNamespace(amp=amp), SimpleNamespace(store_ema=False)
            self.cfg = SimpleNamespace(common=common, ema=ema)

    with pytest.raises(Seen):
        WithoutModel().valid_step({})
    assert seen == [amp]


@pytest.mark.parametrize("clip_norm", ["0.0", "1.0"])
def test_a_training_unscales_once(
    clip_norm: str, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU computes in full precision, so only the scale differs."""
    monkeypatch.setattr(trainer, "check_precision", lambda common, flags: None)
    flags = ("--optimizer", "sgd", "--lr", "1.0", "--clip-norm", clip_norm, "--max-update", "4")
    flags = (*flags, "--dropout", "0", "--disable-validation", "--no-save")
    amp = ("--amp", "--fp16-init-scale", str(SCALE))
    mixed, plain = (
        [
            float(record["loss"])
            for record in commands.records(
                commands.train(data_bin, tmp_path, "dense", *flags, *more)
            )
        ]
        for more in (amp, ())
    )
    assert mixed == pytest.approx(plain, rel=1e-3)
    assert len(plain) == 4 and plain[3] < plain[0] - 0.5
