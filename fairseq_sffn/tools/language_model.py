"""Build language models from flags alone, without data."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import DictConfig, OmegaConf

from ..errors import UsageError, flag

MOST_TYPES = 2**24
"""Largest number of types in a dictionary. Making such a dictionary takes a few seconds."""

UNCOUNTED = {
    "adaptive_input": "the cost of adaptive embeddings depends on the token",
    "adaptive_softmax_cutoff": "the cost of an adaptive softmax depends on the token",
    "character_embeddings": "the convolutions of character embeddings are not counted",
    "base_layers": "fairseq's BASE layers are not counted",
}
"""Option of a model -> why the cost of such a model is not known."""


def build_language_model(
    arch: str, vocab_size: int, context: int, flags: Sequence[str], strict: bool = True
) -> TransformerLanguageModel:
    """Return a model as fairseq-train builds it, on the meta device if possible.

    Args:
        arch: name of the architecture.
        vocab_size: types in the dictionary, fairseq's special ones included.
        context: number of positions.
        flags: the model's flags.
        strict: whether to refuse other flags, such as a criterion's, instead of ignoring them.

    Raises:
        UsageError: the model cannot be built. The message names the flag, the value and the reason.
    """
    check_language_model(arch)
    if vocab_size > MOST_TYPES:
        raise UsageError(f"--vocab-size {vocab_size}: must be at most {MOST_TYPES}")
    parser = argparse.ArgumentParser(
        prog="fairseq-sffn",
        usage="%(prog)s COMMAND --arch ARCH --vocab-size TYPES [flags of the model]",
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    models.ARCH_MODEL_REGISTRY[arch].add_args(parser)
    options, others = parser.parse_known_args(flags)
    if others and strict:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return build_from_config(model_config(arch, context, options), vocab_size, f"--arch {arch}")


def build_from_config(
    config: DictConfig, vocab_size: int, what: str, stored: bool = False
) -> TransformerLanguageModel:
    """Return the model of a configuration, on the meta device if possible.

    Args:
        config: the model's configuration.
        vocab_size: types in the dictionary, fairseq's special ones included.
        what: the model, for the message.
        stored: whether the configuration is that of a checkpoint, which may have other options.

    Raises:
        UsageError: the model cannot be built.
    """
    dictionary = Dictionary()
    for i in range(vocab_size - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    task = LanguageModelingTask(OmegaConf.create({}), dictionary)
    try:
        try:
            with torch.device("meta"):
                return models.build_model(config, task, stored)
        except RuntimeError:  # hash tables are computed from values; the meta device has none
            return models.build_model(config, task, stored)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{what}: fairseq cannot build this model: {reason}") from error


def check_language_model(arch: str) -> None:
    """Refuse an architecture that is not a Transformer language model.

    Raises:
        UsageError: the message names similar architectures, or the kind of the model.
    """
    known, names = models.ARCH_MODEL_REGISTRY, models.ARCH_MODEL_NAME_REGISTRY
    counted = [
        name
        for name, cls in known.items()
        if issubclass(cls, TransformerLanguageModel)
        and names[name] in models.MODEL_DATACLASS_REGISTRY  # not fairseq's model-parallel ones
    ]
    if arch in counted:
        return
    if arch not in known:
        close = ", ".join(difflib.get_close_matches(arch, counted))
        raise UsageError(f"--arch {arch}: is unknown" + (f"; there is {close}" if close else ""))
    kind = "another kind of model"
    if issubclass(known[arch], models.FairseqEncoderDecoderModel):
        kind = "an encoder-decoder model"
    raise UsageError(
        f"--arch {arch}: this command is for Transformer language models; this is {kind}"
    )


def model_config(arch: str, context: int, options: argparse.Namespace) -> DictConfig:
    """Return the configuration of a model, with the architecture's defaults.

    Args:
        arch: name of the architecture.
        context: number of positions.
        options: the options that the command line sets.

    Raises:
        UsageError: the cost of the model is not known, or its widths differ. The message names the
            flag, the value and the reason.
    """
    asked = set(vars(options))
    options.arch, options.task, options.tokens_per_sample = arch, "language_modeling", context
    models.ARCH_CONFIG_REGISTRY[arch](options)
    config = convert_namespace_to_omegaconf(options).model

    def refuse(name: str, reason: str) -> None:
        shown = flag(name) if config[name] is True else f"{flag(name)} {config[name]}"
        raise UsageError(f"{shown}: {reason}" + ("" if name in asked else f" (set by {arch})"))

    for name, reason in UNCOUNTED.items():
        if config[name]:
            refuse(name, reason)
    tied = config.share_decoder_input_output_embed
    if tied and config.decoder_input_dim != config.decoder_output_dim:
        reason = f"embeddings of --decoder-input-dim {config.decoder_input_dim} cannot be shared"
        refuse("decoder_output_dim", reason)
    return config
