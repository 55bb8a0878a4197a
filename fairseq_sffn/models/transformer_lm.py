"""The registered language models: every method in every size.

Each method in each size is a fairseq *model*, not only an architecture. ``fairseq-train --arch
NAME`` and ``fairseq-hydra-train`` with ``model._name: NAME`` therefore have the same defaults.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import II
from torch import nn

from ..errors import UsageError, flag
from .config import DenseConfig, sparse
from .decoder import SparseTransformerDecoder
from .gated import GatedTransformerDecoder, ffn_width
from .memory_config import build_memory_configs, check_supported
from .plugin_model import PluginModel, check_selector, register


class DenseTransformerLM(PluginModel, TransformerLanguageModel):
    """fairseq's dense Transformer language model: a baseline in every size."""

    config_class: ClassVar[type[FairseqDataclass]] = DenseConfig

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """Return a model.

        Args:
            args: the model's options.
            task: the task, which has the dictionary.

        Raises:
            UsageError: the embeddings cannot be shared as the options say, or the width of gated
                FFNs is wrong.
        """
        args = cls.options(args)
        ffn_width(args, "decoder")  # checks it
        if args.sffn_glu is None:
            return cls.build_dense_model(args, task)
        embed_tokens = cls.build_embed_tokens(args, task)
        return cls(
            GatedTransformerDecoder(
                args, task.target_dictionary, embed_tokens, no_encoder_attn=True
            )
        )

    @classmethod
    def build_embed_tokens(cls, args: Any, task: Any) -> nn.Module:
        """Return the embeddings of a model whose decoder is not fairseq's.

        Args:
            args: the model's options. Those that fairseq fills in are set.
            task: the task, which has the dictionary.

        Raises:
            UsageError: the embeddings cannot be shared as the options say.
        """
        # fairseq builds embeddings (adaptive, character, ...) and decoder in one function. So build
        # a model without layers, and keep its embeddings.
        shell_args = copy.deepcopy(args)
        shell_args.decoder_layers, shell_args.decoder_layers_to_keep = 0, None
        shell = cls.build_dense_model(shell_args, task)
        args.max_target_positions = shell_args.max_target_positions
        args.checkpoint_activations = shell_args.checkpoint_activations
        if args.decoder_layers_to_keep:
            args.decoder_layers = len(args.decoder_layers_to_keep.split(","))
        embed_tokens: nn.Module = shell.decoder.embed_tokens
        return embed_tokens

    @classmethod
    def build_dense_model(cls, args: Any, task: Any) -> Any:
        """Return a model with fairseq's decoder.

        Args:
            args: the model's options. Those that fairseq fills in are set.
            task: the task, which has the dictionary.

        Raises:
            UsageError: the embeddings cannot be shared as the options say.
        """
        tied = args.share_decoder_input_output_embed and args.adaptive_softmax_cutoff is None
        for name in ("character_embeddings", "adaptive_input"):
            if tied and getattr(args, name):
                raise UsageError(
                    f"{flag(name)}: these embeddings cannot be the output projection as well; "
                    "add --no-share-decoder-input-output-embed"
                )
        if tied and args.decoder_input_dim != args.decoder_output_dim:
            raise UsageError(
                f"--decoder-output-dim {args.decoder_output_dim}: must equal --decoder-input-dim "
                f"{args.decoder_input_dim} where the embeddings are the output projection as well; "
                "or add --no-share-decoder-input-output-embed"
            )
        if args.offload_activations:  # as the flag's help says
            args.checkpoint_activations = True
        return super().build_model(args, task)


class SparseTransformerLM(DenseTransformerLM):
    """A Transformer language model with sparse layers.

    Every ``--sffn-freq``-th layer is sparse, or those that ``--sffn-layers`` names.
    """

    config_class: ClassVar[type[FairseqDataclass]] = sparse("SparseLMConfig", DenseConfig)
    selector: ClassVar[Optional[str]] = None
    """The selector in the model's name; ``None``: any."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "SparseTransformerLM":
        """Return a model.

        Args:
            args: the model's options.
            task: the task, which has the dictionary and may have token counts.

        Raises:
            UsageError: an option is not supported, or has a wrong value.
        """
        args = cls.options(args)
        check_supported(args, ["decoder"])
        check_selector(args, cls.selector, "transformer_lm_sffn")
        dictionary = task.source_dictionary
        counts = task.token_counts() if hasattr(task, "token_counts") else dictionary.count
        memory_configs = build_memory_configs(args, len(dictionary), counts)
        decoder = SparseTransformerDecoder(
            args,
            task.target_dictionary,
            cls.build_embed_tokens(args, task),
            memory_configs,
            no_encoder_attn=True,
        )
        return cls(decoder)


SIZES: dict[str, dict[str, Any]] = {
    "": {},
    "_tiny": {
        "decoder_layers": 4,
        "decoder_embed_dim": 128,
        "decoder_attention_heads": 4,
        "decoder_ffn_embed_dim": 512,
        "share_decoder_input_output_embed": True,
    },
    # fairseq's 355M configuration, the training base of Liu et al. 2023.
    "_gpt3_medium": {
        "activation_fn": "gelu",
        "dropout": 0.0,
        "decoder_layers": 24,
        "decoder_embed_dim": 1024,
        "decoder_attention_heads": 16,
        "decoder_ffn_embed_dim": 4096,
        "share_decoder_input_output_embed": True,
    },
}
"""Suffix of a model's name -> the defaults that differ from fairseq's."""

SPARSE_SIZES: dict[str, dict[str, Any]] = {
    "": {},
    "_tiny": {"sffn_freq": 2, "sffn_expansion": 16},
    "_gpt3_medium": {"sffn_freq": 6, "sffn_expansion": 16},
}


class Method(NamedTuple):
    """A selection method for which models are registered.

    Attributes:
        name: the models are ``transformer_lm_{name}`` and this name with each size.
        selector: the selector; ``None``: ``--sffn-selector`` chooses it.
        options: defaults that differ from the selector's own.
    """

    name: str
    selector: Optional[str]
    options: Mapping[str, Any] = MappingProxyType({})


METHODS = (
    Method("sffn", selector=None),
    Method("avgk", selector="avgk"),
    Method("vanilla_m", selector="vanilla_m"),
    Method("lorkm", selector="lorkm"),
    # Lample et al. 2019: 4 heads take 32 cells each.
    Method("pkm", selector="pkm", options={"sffn_active_blocks": 128}),
    Method("pkm_4d", selector="pkm"),
    Method("pkm_ffn", selector="pkm_ffn"),
    Method("rand_hash", selector="rand_hash"),
    Method("hash_layer", selector="hash_layer"),
    Method("switch", selector="switch"),
    Method("gshard", selector="gshard"),
    # Lepikhin et al. 2020: two experts, each as wide as the FFN.
    Method(
        "gshard_8d",
        selector="gshard",
        options={
            "sffn_block_size": II("model.decoder_ffn_embed_dim"),
            "sffn_active_blocks": 2,
        },
    ),
    Method("base", selector="base"),
    # The rate of DeepSeek-V3 (arXiv 2412.19437, section 4.2).
    Method("moe", selector="moe", options={"sffn_balance_rate": 0.001}),
    Method("sigma_moe", selector="sigma_moe"),
    Method("hash_moe", selector="hash_moe"),
    Method("aoe", selector="aoe"),
)


for _size in SIZES:
    register(f"transformer_lm_dense{_size}", DenseTransformerLM, SIZES[_size])
    for _method in METHODS:
        _defaults = SIZES[_size] | SPARSE_SIZES[_size] | dict(_method.options)
        if _method.selector:
            _defaults["sffn_selector"] = _method.selector
        register(
            f"transformer_lm_{_method.name}{_size}",
            SparseTransformerLM,
            _defaults,
            selector=_method.selector,
        )
