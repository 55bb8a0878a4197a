"""Checks of the options of a Transformer before it is built."""

from __future__ import annotations

import copy
from typing import Any

from fairseq import models

from ..errors import UsageError, flag, shown
from ..models.size import check_size
from .checks import check_group, class_of, is_known, is_transformer, numbers_of
from .configuration import writable


def check_model(options: Any, task: Any) -> None:
    """Check the options of a model. Models other than Transformers are not checked.

    Args:
        options: the model's options.
        task: the task, which has the dictionaries.

    Raises:
        UsageError: an option is out of its range, or the model is too large for the machine.
    """
    cls = class_of("model", options)
    if is_known(cls) and is_transformer(cls):
        options = with_defaults_of_architecture(options)
        check_group("model", options)
        check_cutoffs(options, task)
        check_size(options, task)


def check_cutoffs(args: Any, task: Any) -> None:
    """Check that the cutoffs of adaptive embeddings are within the dictionary.

    Args:
        args: the model's options.
        task: the task, which has the dictionaries.

    Raises:
        UsageError: the last cutoff is above the number of types.
    """
    for option, side in (("softmax", "target"), ("input", "source")):
        name = f"adaptive_{option}_cutoff"
        cutoffs = numbers_of(getattr(args, name, None))
        types = len(getattr(task, f"{side}_dictionary", None) or ())
        if cutoffs and types and cutoffs[-1] > types:
            raise UsageError(
                f"{flag(name)} {shown(getattr(args, name))}: is beyond the {types} types of the "
                "dictionary"
            )


def with_defaults_of_architecture(options: Any) -> Any:
    """Return a model's options with the defaults of its architecture."""
    name = getattr(options, "_name", None) or getattr(options, "arch", None)
    if name in models.MODEL_DATACLASS_REGISTRY or name not in models.ARCH_CONFIG_REGISTRY:
        return options
    options = copy.deepcopy(options)
    with writable(options):
        models.ARCH_CONFIG_REGISTRY[name](options)
    return options
