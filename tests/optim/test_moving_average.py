"""``--store-ema`` averages a model with integer buffers."""

from types import SimpleNamespace

import torch

from fairseq_sffn.optim.moving_average import MovingAverage


def test_moving_average_copies_integers() -> None:
    model = torch.nn.BatchNorm1d(2)  # it counts its batches in an integer
    config = SimpleNamespace(ema_decay=0.5, ema_seed_model=None, ema_fp32=False, ema_update_freq=1)
    config.ema_start_update = 0
    average = MovingAverage(model, config)
    model.num_batches_tracked += 3
    with torch.no_grad():
        model.weight += 2
    average.step(model, updates=1)
    state = average.get_model().state_dict()
    assert state["num_batches_tracked"] == 3 and state["weight"].tolist() == [2, 2]
