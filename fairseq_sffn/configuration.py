"""The configurations that fairseq's functions are called with.

fairseq's commands and its trainer take an ``argparse.Namespace`` as well as a configuration, and
convert it when they begin. A wrapper begins earlier.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf, open_dict


def as_configuration(cfg: Any) -> Any:
    """Convert an ``argparse.Namespace`` as fairseq does, and return anything else unchanged."""
    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, argparse.Namespace) else cfg


def writable(options: Any) -> AbstractContextManager[Any]:
    """Allow new options in a configuration while open; a namespace always allows them."""
    return open_dict(options) if OmegaConf.is_config(options) else nullcontext()
