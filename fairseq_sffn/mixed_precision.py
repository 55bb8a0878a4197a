"""fairseq's half and mixed precision (``--bf16``, ``--amp``) on GPUs and CPUs.

Each function is one repair, as those of :mod:`.compat`: what breaks, and when it can go.
"""

from __future__ import annotations

import functools
from typing import Any

from fairseq import options, utils

from .compat import replace_once


def apply() -> None:
    """Apply every repair."""
    leave_bf16_where_it_is()


def leave_bf16_where_it_is() -> None:
    """On the command line fairseq takes ``--bf16`` and ``--memory-efficient-bf16`` for a TPU, looks
    for one in place of the GPU, and fails. Takes them for what there is, unless the package that
    TPUs need is installed. Can go when fairseq's ``parse_args_and_arch`` leaves ``tpu`` alone."""

    @functools.wraps(options.parse_args_and_arch)
    def parse_args_and_arch(*args: Any, **kwargs: Any) -> Any:
        parsed = original(*args, **kwargs)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed
        if utils.xm is None and getattr(namespace, "bf16", False):
            namespace.tpu = False
        return parsed

    original = options.parse_args_and_arch
    replace_once(options, "parse_args_and_arch", parse_args_and_arch)
