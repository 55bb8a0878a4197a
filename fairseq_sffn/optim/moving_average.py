"""The moving average of ``--store-ema`` for models with integer buffers."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models.ema.ema import EMA


class MovingAverage(EMA):
    """fairseq's moving average of a model.

    fairseq also averages buffers, and fails on integers, such as hash tables. This class copies
    them. fairseq restores its model without the modules' versions. A Transformer then assumes an
    old checkpoint, and drops its last layer norm. This class keeps the versions.
    """

    skip_keys: set[str]

    def __init__(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        state = model.state_dict()
        self.skip_keys = {*self.skip_keys, *(k for k in state if not state[k].is_floating_point())}

    def restore(self, state_dict: dict[str, Any], build_fp32_params: bool = False) -> None:
        """Load a stored average, and keep the versions of the modules.

        Args:
            state_dict: name -> average.
            build_fp32_params: see fairseq's ``EMA``.
        """
        own = self.model.state_dict()
        versions = {key: own[key] for key in own if key.endswith("version")}
        super().restore({**versions, **state_dict}, build_fp32_params)
