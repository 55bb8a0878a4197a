"""Names in checkpoints of earlier versions of the plugin."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

ENGINES = {"bags": "embedding_bag", "native_bags": "native_embedding_bag"}
"""Old value of ``--sffn-engine`` -> the value today."""
METERS = {"_mass_": "_importance_"}
"""How the names of meters began -> how they begin today."""


def rename(state: dict[str, Any]) -> None:
    """Replace the names that have changed, in place.

    Args:
        state: content of a checkpoint.
    """
    for options in ((state.get("cfg") or {}).get("model"), state.get("args")):
        values = vars(options) if isinstance(options, Namespace) else options
        if isinstance(values, dict) and (engine := values.get("sffn_engine")) in ENGINES:
            values["sffn_engine"] = ENGINES[engine]
    stored = (state.get("extra_state") or {}).get("metrics") or {}
    for name, meters in stored.items():
        stored[name] = [(priority, today(key), *rest) for priority, key, *rest in meters]


def today(meter: str) -> str:
    """Return the name of a meter today."""
    for old, new in METERS.items():
        if meter.startswith(old):
            return new + meter.removeprefix(old)
    return meter
