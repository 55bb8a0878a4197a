"""Small language models built in process, from the configs that fairseq-hydra-train would make."""

from __future__ import annotations

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
SIZES = ("", "_tiny", "_gpt3_medium")
TYPES = 20
WIDTH, FFN = 16, 32
PAD = 1


def dictionary(types: int = TYPES) -> Dictionary:
    """``types`` types, fairseq's four special ones included, of falling frequency."""
    result = Dictionary()
    for i in range(types - len(result)):
        result.add_symbol(f"w{i}", n=1000 // (i + 1))
    return result


def lm_config(name: str, tokens_per_sample: int = 16, **options: Any) -> DictConfig:
    """The model's config: its own defaults but for ``options``."""
    config = OmegaConf.structured(FairseqConfig)
    with open_dict(config):
        config.task = {"_name": "language_modeling", "tokens_per_sample": tokens_per_sample}
        config.model = {"_name": name, **options}
        add_defaults(config)
    return config.model


def small_config(method: str, **options: Any) -> DictConfig:
    """Two layers, of which the second is sparse, without dropout."""
    sizes: dict[str, Any] = dict(
        decoder_layers=2,
        decoder_embed_dim=WIDTH,
        decoder_ffn_embed_dim=FFN,
        decoder_attention_heads=2,
        dropout=0.0,
    )
    if method in ("avgk", "rand_hash"):  # whose blocks would be wider than the FFN
        sizes["sffn_block_size"] = 8
    if method == "pkm":
        sizes["sffn_active_blocks"] = 16
    return lm_config(f"transformer_lm_{method}_tiny", **{**sizes, **options})


def language_modeling(types: int = TYPES) -> LanguageModelingTask:
    """fairseq's task, on no data."""
    return LanguageModelingTask(OmegaConf.create({}), dictionary(types))


def build(config: DictConfig, types: int = TYPES) -> Any:
    """The model of a config."""
    return models.build_model(config, language_modeling(types))


def small_lm(method: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small model in training mode."""
    return build(small_config(method, **options)).to(dtype)


def random_tokens(*shape: int) -> Tensor:
    """Token ids that are no special ones."""
    return torch.randint(Dictionary().nspecial, TYPES, shape)


def pad(rows: list[Tensor], length: int | None = None) -> Tensor:
    """The rows as a batch, padded on the right."""
    length = length or max(map(len, rows))
    return torch.stack(
        [torch.nn.functional.pad(row, (0, length - len(row)), value=PAD) for row in rows]
    )
