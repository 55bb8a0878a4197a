"""Small models that a plan is made for, and what autograd keeps of a pass."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

from fairseq_sffn.criterions.sffn_cross_entropy import (
    SFFNCrossEntropyConfig,
    SFFNCrossEntropyCriterion,
)
from fairseq_sffn.tools.plan import Setting
from tests.models.small_lm import SMALL_BLOCKS, build, language_modeling, lm_config

WIDTH, TYPES = 64, 104
TOKENS, LENGTH = 256, 32


def lm(name: str, **options: Any) -> Any:
    """Build two layers without dropout, of which the second is sparse, with the engine of a GPU."""
    sizes = dict(decoder_layers=2, decoder_embed_dim=WIDTH, decoder_ffn_embed_dim=256, dropout=0.0)
    if name in SMALL_BLOCKS:
        sizes["sffn_block_size"] = 16
    if name != "dense":
        cells = name in ("vanilla_m", "lorkm") or name.startswith("pkm")
        sizes["sffn_engine"] = "embedding_bag" if cells else "tiled"
    config = lm_config(f"transformer_lm_{name}_tiny", LENGTH, **{**sizes, **options})
    return build(config, TYPES).float()


def loss_of(model: nn.Module, world_size: int = 1) -> torch.Tensor:
    config = SFFNCrossEntropyConfig(
        sentence_avg=False,
        distributed_world_size=world_size,
        ddp_backend="legacy_ddp",
        log_format="simple",
        tensorboard_logdir="",
    )
    tokens = torch.randint(4, TYPES, (TOKENS // LENGTH, LENGTH + 1))
    lengths = torch.full((len(tokens),), LENGTH)
    sample = {
        "net_input": {"src_tokens": tokens[:, :-1].clone(), "src_lengths": lengths},
        "target": tokens[:, 1:].clone(),
        "ntokens": TOKENS,
    }
    return SFFNCrossEntropyCriterion(config, language_modeling(TYPES))(model, sample)[0]


class Kept:
    """Holds a tensor as long as autograd keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def loss_and_kept_bytes(model: nn.Module, world_size: int = 1) -> tuple[torch.Tensor, int]:
    """Return the loss, and the bytes of distinct storages kept for its backward pass, without
    parameters and token ids."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        # Detached, as a result that its own operator keeps would otherwise keep that operator.
        kept.add(packed := Kept(tensor.detach()))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = loss_of(model, world_size)
    gc.collect()
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage() for k in kept}
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    token_ids = 2 * TOKENS * torch.int64.itemsize  # the embedding and the loss read them
    return loss, sum(storage.nbytes() for storage in storages.values()) - token_ids


def setting(**options: Any) -> Setting:
    plain = dict(
        world_size=1,
        sffn_expert_parallel=1,
        tokens_per_rank=TOKENS,
        tokens_per_sample=LENGTH,
        precision="fp32",
        bandwidth=25.0,
        flops=100.0,
    )
    return Setting(**{**plain, **options})
