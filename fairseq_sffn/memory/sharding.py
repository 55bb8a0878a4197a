"""Whether and how the blocks of a memory can be divided over ranks."""

from __future__ import annotations

from .config import MemoryConfig
from .selection import Selector
from .validation import ConfigError

SHARDED = ("keys", "key_bias", "up", "up_bias", "values")
"""Parameters of which each rank holds the rows of its own blocks, where blocks are sharded."""


def can_be_sharded(selector: type[Selector]) -> bool:
    """Return whether different ranks can hold different blocks of this method."""
    return selector.key_table == "full" and not selector.scores_every_key


def check_sharding(config: MemoryConfig, shards: int) -> None:
    """Check that the blocks can be divided over this number of ranks.

    Raises:
        ConfigError: the field ``shards``, and why not.
    """
    selector = config.selector_class
    if shards < 1:
        raise ConfigError("shards", shards, "must be at least 1")
    if shards == 1:
        return
    if selector.scores_every_key:
        reason = f"{selector.name} scores every key for every token, and no rank has all of them"
    elif not can_be_sharded(selector):
        reason = f"{selector.name} has keys of its own, which every token needs whole"
    elif config.routed_blocks % shards or not config.routed_blocks:
        kind = " that are not shared" if config.shared_blocks else ""
        reason = f"does not divide the {config.routed_blocks} blocks of a layer{kind}"
    else:
        return
    raise ConfigError("shards", shards, reason)
