"""The types of configurations that fairseq's functions take.

Python callers may pass an ``argparse.Namespace`` to fairseq's commands and to its trainer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf, open_dict


def as_configuration(cfg: Any) -> Any:
    """Convert an ``argparse.Namespace`` as fairseq does, and return other values unchanged."""
    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, argparse.Namespace) else cfg


def writable(options: Any) -> AbstractContextManager[Any]:
    """Return a context in which a configuration, or a namespace, accepts new options."""
    return open_dict(options) if OmegaConf.is_config(options) else nullcontext()


@contextmanager
def batches_of_any_size(config: Any) -> Iterator[None]:
    """Return a context in which batches may have any size, so that the last batch is used.

    Otherwise, fairseq leaves out the last batch if its size is not a multiple of
    ``--required-batch-size-multiple``.

    Args:
        config: the option group ``dataset``.
    """
    required = config.required_batch_size_multiple
    config.required_batch_size_multiple = 1
    try:
        yield
    finally:
        config.required_batch_size_multiple = required
