"""The encoder-decoder Transformer with sparse layers on both sides."""

import copy
from typing import Any, ClassVar, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models.transformer import TransformerModel
from torch import Tensor

from ..errors import UsageError
from .config import TranslationConfig, sparse
from .decoder import SparseTransformerDecoder
from .encoder import SparseTransformerEncoder
from .memory_config import build_memory_configs, check_supported
from .plugin_model import PluginModel, check_selector, register


class SparseTransformer(PluginModel, TransformerModel):
    """fairseq's ``transformer`` with sparse layers.

    Every ``--sffn-freq``-th layer of the encoder and of the decoder is sparse, or those that
    ``--sffn-layers`` names.
    """

    config_class: ClassVar[type[FairseqDataclass]] = sparse(
        "SparseTranslationConfig", TranslationConfig
    )
    selector: ClassVar[Optional[str]] = None
    """The selector in the model's name; ``None``: any."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "SparseTransformer":
        """Return a model.

        Args:
            args: the model's options.
            task: the task, which has the dictionaries.

        Raises:
            UsageError: an option is not supported, or has a wrong value.
        """
        args = cls.options(args)
        check_supported(args, ["encoder", "decoder"])
        check_selector(args, cls.selector, "transformer_sffn")
        # fairseq shares embeddings while it builds a model. So build a model without layers, and
        # keep its embeddings.
        shell_args = copy.deepcopy(args)
        for side in ("encoder", "decoder"):
            setattr(shell_args, f"{side}_layers", 0)
            setattr(shell_args, f"{side}_layers_to_keep", None)
        try:
            shell = super().build_model(shell_args, task)
        except ValueError as error:  # embeddings cannot be shared
            raise UsageError(str(error)) from error
        for name in (
            "max_source_positions",
            "max_target_positions",
            "checkpoint_activations",
            "share_decoder_input_output_embed",
        ):
            setattr(args, name, getattr(shell_args, name))
        # fairseq sets this option in a copy of the options.
        args.share_decoder_input_output_embed |= args.merge_src_tgt_embed
        source, target = shell.encoder.dictionary, shell.decoder.dictionary
        memory_configs = {
            side: build_memory_configs(args, len(dictionary), dictionary.count, side)
            for side, dictionary in (("encoder", source), ("decoder", target))
        }
        for side in ("encoder", "decoder"):
            if kept := getattr(args, f"{side}_layers_to_keep"):
                setattr(args, f"{side}_layers", len(kept.split(",")))
        encoder = SparseTransformerEncoder(
            args,
            source,
            shell.encoder.embed_tokens,
            memory_configs["encoder"],
            prefix="encoder_layer",
        )
        decoder = SparseTransformerDecoder(
            args,
            target,
            shell.decoder.embed_tokens,
            memory_configs["decoder"],
            no_encoder_attn=args.no_cross_attention,
            prefix="decoder_layer",
        )
        return cls(args, encoder, decoder)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor,
        return_all_hiddens: bool = True,
        *,
        routing_losses: bool = False,
        is_dummy: bool = False,
        balance_scope: str = "micro",
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run encoder and decoder.

        Args:
            src_tokens, src_lengths, prev_output_tokens, return_all_hiddens, kwargs: see fairseq.
            routing_losses, is_dummy, balance_scope: see the decoder's ``extract_features``.

        Returns:
            (B, T, V) logits, and the extra outputs with ``routing``.
        """
        routing: dict[str, Any] = dict(
            routing_losses=routing_losses, is_dummy=is_dummy, balance_scope=balance_scope
        )
        encoder_out = self.encoder(src_tokens, src_lengths, return_all_hiddens, **routing)
        return self.decoder(prev_output_tokens, encoder_out, **routing, **kwargs)


register("transformer_sffn", SparseTransformer, {}, selector=None)
register("transformer_avgk", SparseTransformer, {"sffn_selector": "avgk"}, selector="avgk")
