"""Makes plain decoders from small models of fairseq, and a cache for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_sffn.export.decoder import Decoder
from fairseq_sffn.export.description import describe
from fairseq_sffn.tools.export import exported_tensors
from tests.models.small_lm import build, dictionary, pad, small_config


class PlainCache:
    """Keys and values of past positions."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.stored[0][0].shape[2] if self.stored else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        new = (keys, values)
        old = self.stored.get(layer)
        self.stored[layer] = new if old is None else tuple(map(concatenate, old, new))  # type: ignore[assignment]
        return self.stored[layer]


def concatenate(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old, new], dim=2)


def config_of(method: str, **options: Any) -> Any:
    """Make the config of three layers, which are all sparse unless the method is dense."""
    sizes: dict[str, Any] = {} if method == "mixed" else dict(decoder_layers=3)
    if method not in ("dense", "mixed"):
        sizes["sffn_freq"] = 1
    return small_config(method, **{**sizes, **options})


def pair(method: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Decoder]:
    """Build a model of fairseq with random buffers, and the plain decoder with its tensors."""
    config = config_of(method, **options)
    model = build(config).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("layer_norm.weight", "ln.weight", "w_resid", "c_attn")):
                tensor.uniform_(0.5, 2)
            elif name.endswith((".bias", "hidden_totals")):  # also of the balancer
                tensor.normal_().abs_()
    return model, decoder_of(model, type(model).options(config), dtype)


def decoder_of(model: Any, options: Any, dtype: torch.dtype) -> Decoder:
    """Build the plain decoder with the tensors of a model."""
    description = describe(model, options)
    decoder = Decoder(SimpleNamespace(**description)).to(dtype).eval()
    tensors = exported_tensors(model, model.state_dict(), description["tied_embeddings"])
    decoder.load_state_dict(
        {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    )
    return decoder


def write_checkpoint(folder: Path, method: str, **options: Any) -> tuple[Path, Path, Any]:
    """Write a checkpoint of an untrained model, and the folder of its dictionary.

    Returns:
        The checkpoint, the folder, and the model.
    """
    model, _ = pair(method, torch.float32, **options)
    # As in a checkpoint: without references to other options.
    stored = vars(type(model).options(config_of(method, **options)))
    plain = {key: value for key, value in stored.items() if not str(value).startswith("${")}
    name = "sffn" if method == "mixed" else method
    state = {
        "cfg": {
            "model": {**plain, "_name": f"transformer_lm_{name}_tiny"},
            "task": {"_name": "language_modeling", "tokens_per_sample": 16, "data": None},
            "criterion": {"_name": "sffn_cross_entropy"},
        },
        "args": None,
        "model": model.state_dict(),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": None,
    }
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "model.pt")
    dictionary().save(str(folder / "dict.txt"))
    return folder / "model.pt", folder, model


def greedy(model: Any, prompts: Tensor, length: int) -> Tensor:
    """Decode with fairseq's generator, one beam, behind prompts without ``</s>``."""
    generator = SequenceGenerator([model], dictionary(), beam_size=1, max_len_b=length)
    sample = {"net_input": {"src_tokens": prompts}}
    found = generator.generate([model], sample, prefix_tokens=prompts)
    return pad([hypotheses[0]["tokens"] for hypotheses in found], length + 1)
