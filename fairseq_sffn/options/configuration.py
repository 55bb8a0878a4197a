"""The configurations that fairseq's functions are called with.

Python callers may give an ``argparse.Namespace`` to fairseq's commands and to its trainer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf, open_dict


def as_configuration(cfg: Any) -> Any:
    """Convert an ``argparse.Namespace`` as fairseq does, and return anything else unchanged."""
    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, argparse.Namespace) else cfg


def writable(options: Any) -> AbstractContextManager[Any]:
    """Allow new options in a configuration while open; a namespace always allows them."""
    return open_dict(options) if OmegaConf.is_config(options) else nullcontext()


@contextmanager
def batches_of_any_size(config: Any) -> Iterator[None]:
    """Allow batches of any size while open, so that the last batch is used.

    fairseq otherwise leaves it out where its size is no multiple of
    ``--required-batch-size-multiple``.

    Args:
        config: the group ``dataset``.
    """
    required = config.required_batch_size_multiple
    config.required_batch_size_multiple = 1
    try:
        yield
    finally:
        config.required_batch_size_multiple = required
