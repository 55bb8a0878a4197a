"""Names in checkpoints of earlier versions of the plugin."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

ENGINES = {"bags": "embedding_bag", "native_bags": "native_embedding_bag"}
"""Old value of ``--sffn-engine`` -> the value today."""
OPTIONS = {"avgk_balance_rate": "sffn_balance_rate"}
"""Old name of a model's option -> the name today."""
BUFFERS = {".selector.balance_bias": ".balancer.bias"}
"""How the name of a tensor ended -> how it ends today."""
METERS = {"_mass_": "_importance_"}
"""How the names of meters began -> how they begin today."""


def rename(state: dict[str, Any]) -> None:
    """Replace the names that have changed, in place.

    Args:
        state: content of a checkpoint.
    """
    for options in ((state.get("cfg") or {}).get("model"), state.get("args")):
        values = vars(options) if isinstance(options, Namespace) else options
        if not isinstance(values, dict):
            continue
        if (engine := values.get("sffn_engine")) in ENGINES:
            values["sffn_engine"] = ENGINES[engine]
        for old, new in OPTIONS.items():
            if (value := values.pop(old, None)) is not None:
                values[new] = value
    extra_state = state.get("extra_state") or {}
    for tensors in (state.get("model") or {}, extra_state.get("ema") or {}):
        for old, new in BUFFERS.items():
            for name in [name for name in tensors if name.endswith(old)]:
                tensors[name.removesuffix(old) + new] = tensors.pop(name)
    stored = extra_state.get("metrics") or {}
    for name, meters in stored.items():
        stored[name] = [(priority, today(key), *rest) for priority, key, *rest in meters]


def today(meter: str) -> str:
    """Return the name of a meter today."""
    for old, new in METERS.items():
        if meter.startswith(old):
            return new + meter.removeprefix(old)
    return meter
