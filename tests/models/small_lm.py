"""Builds small language models from configs in the form of fairseq-hydra-train's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from fairseq_sffn.models import transformer_lm

METHODS = ("dense", *(method.name for method in transformer_lm.METHODS if method.selector))
SPARSE = tuple(method for method in METHODS if method != "dense")
SMALL_BLOCKS = ("avgk", "rand_hash", "moe", "sigma_moe", "hash_moe")
"""Methods with blocks of 64 or 128 cells by default."""
SIZES = ("", "_tiny", "_gpt3_medium")
PLAN = "hash_layer:0,avgk/block_size=8:1,switch:2"
"""A plan of three layers, each with another selector. The method ``mixed`` has it."""
TYPES = 20
WIDTH, FFN = 16, 32
PAD = 1


def dictionary(types: int = TYPES) -> Dictionary:
    """Make a dictionary of ``types`` types of falling frequency, including fairseq's four special
    ones."""
    result = Dictionary()
    for i in range(types - len(result)):
        result.add_symbol(f"w{i}", n=1000 // (i + 1))
    return result


def lm_config(name: str, tokens_per_sample: int = 16, **options: Any) -> DictConfig:
    """Make the model's config: its defaults changed by ``options``."""
    made = _lm_config(name, tokens_per_sample, _Options(options))
    return copy.deepcopy(made)


class _Options(dict[str, Any]):
    """Options that are equal if their texts are, as some are lists and 1 equals True."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)


@functools.lru_cache(300)
def _lm_config(name: str, tokens_per_sample: int, options: _Options) -> DictConfig:
    config = copy.deepcopy(_fairseq_config())
    with open_dict(config):
        config.task = {"_name": "language_modeling", "tokens_per_sample": tokens_per_sample}
        config.model = {"_name": name, **options}
        add_defaults(config)
    return config.model


@functools.cache
def _fairseq_config() -> DictConfig:
    return OmegaConf.structured(FairseqConfig)


def small_config(method: str, **options: Any) -> DictConfig:
    """Make the config of two layers without dropout, of which the second is sparse.

    The method ``mixed`` has the three layers of ``PLAN``.
    """
    sizes: dict[str, Any] = dict(
        decoder_layers=2,
        decoder_embed_dim=WIDTH,
        decoder_ffn_embed_dim=FFN,
        decoder_attention_heads=2,
        dropout=0.0,
    )
    if method in SMALL_BLOCKS:  # their default blocks are wider than the FFN
        sizes["sffn_block_size"] = 8
    if method == "pkm":
        sizes["sffn_active_blocks"] = 16
    if method == "mixed":
        method = "sffn"
        sizes |= dict(decoder_layers=3, sffn_layers=PLAN, hash_table="bigram")
    return lm_config(f"transformer_lm_{method}_tiny", **{**sizes, **options})


def language_modeling(types: int = TYPES) -> LanguageModelingTask:
    """Make fairseq's task without data."""
    return LanguageModelingTask(OmegaConf.create({}), dictionary(types))


def build(config: DictConfig, types: int = TYPES) -> Any:
    """Build the model of a config."""
    return models.build_model(config, language_modeling(types))


def small_lm(method: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Build a small model in training mode."""
    return build(small_config(method, **options)).to(dtype)


def evaluated(method: str, **options: Any) -> Any:
    """Build a model of three layers in evaluation mode. All are sparse unless the method is
    dense."""
    if method not in ("dense", "mixed"):
        options["sffn_freq"] = 1
    return small_lm(method, decoder_layers=3, **options).eval()


def random_tokens(*shape: int) -> Tensor:
    """Draw token ids that are not special."""
    return torch.randint(Dictionary().nspecial, TYPES, shape)


def pad(rows: list[Tensor], length: int | None = None) -> Tensor:
    """Make a batch of rows, padded on the right."""
    length = length or max(map(len, rows))
    return torch.stack(
        [torch.nn.functional.pad(row, (0, length - len(row)), value=PAD) for row in rows]
    )
