"""The moving average of ``--store-ema``, with the buffers and versions of sparse models."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models.ema.ema import EMA


class MovingAverage(EMA):
    """fairseq's moving average of a model.

    fairseq averages buffers too, and fails on integers, such as hash tables: they are copied here.
    It restores its model without the modules' versions, which a Transformer takes for those of an
    old checkpoint, and drops its last layer norm: the versions are kept here.
    """

    skip_keys: set[str]

    def __init__(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        state = model.state_dict()
        self.skip_keys = {*self.skip_keys, *(k for k in state if not state[k].is_floating_point())}

    def restore(self, state_dict: dict[str, Any], build_fp32_params: bool = False) -> None:
        """Load an average, and keep the versions of the modules."""
        own = self.model.state_dict()
        versions = {key: own[key] for key in own if key.endswith("version")}
        super().restore({**versions, **state_dict}, build_fp32_params)
