"""``--store-ema`` averages a model with integer buffers."""

from types import SimpleNamespace

import torch

from fairseq_sffn.optim.moving_average import MovingAverage
from tests.models.small_lm import random_tokens, small_lm

CONFIG = SimpleNamespace(
    ema_decay=0.5, ema_seed_model=None, ema_fp32=False, ema_update_freq=1, ema_start_update=0
)


def test_a_restored_average_keeps_its_last_layer_norm() -> None:
    """A stored average may lack the versions of modules. fairseq then takes it for an old one."""
    model = small_lm("avgk").eval()
    average = MovingAverage(model, CONFIG)
    stored = {name: t for name, t in model.state_dict().items() if not name.endswith("version")}
    assert len(stored) < len(model.state_dict())
    average.restore(stored)
    tokens = random_tokens(2, 5)
    assert average.get_model().decoder.layer_norm is not None
    torch.testing.assert_close(average.get_model().eval()(tokens)[0], model(tokens)[0])


def test_moving_average_copies_integers() -> None:
    model = torch.nn.BatchNorm1d(2)  # it counts its batches in an integer
    average = MovingAverage(model, CONFIG)
    model.num_batches_tracked += 3
    with torch.no_grad():
        model.weight += 2
    average.step(model, updates=1)
    state = average.get_model().state_dict()
    assert state["num_batches_tracked"] == 3 and state["weight"].tolist() == [2, 2]
