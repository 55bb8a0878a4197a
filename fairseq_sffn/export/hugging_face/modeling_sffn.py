"""The model that transformers loads, and its configuration.

They are in one file, because transformers loads the model by the class of the configuration. The
class of another folder, with other code, must therefore be another one. transformers 5 tells
folders of one name apart by a hash of a file and of what it imports.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from ...memory import SparseMemory
from ...memory.balancer import Balancer
from ..decoder import Decoder, DecoderLayer

# transformers 5.24 renamed it.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in outputs."""


class SFFNConfig(PretrainedConfig):
    """The values that ``fairseq-sffn export`` writes, as attributes.

    Besides transformers' own, these are the attributes of the decoder, the weights of the losses
    that training adds (``balance_loss_weights``, ``z_loss_weights``, ``balance_loss_scope``), and
    ``fairseq``: the configuration of the training, for ``fairseq-sffn import``.
    """

    model_type = "fairseq_sffn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(self, **kwargs: Any) -> None:
        # No parameter is tied: the embedding is used twice.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


class SFFNForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of fairseq_sffn.

    Args:
        config: see :class:`SFFNConfig`.

    Attributes:
        decoder: the model in plain PyTorch. Its parameters have fairseq's names.
    """

    config_class = SFFNConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = [DecoderLayer.__name__]

    def __init__(self, config: SFFNConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config)
        self.post_init()
        # As memory.wide_buffers. transformers 4 would refuse names of buffers before.
        self._keep_in_fp32_modules_strict = {"balancer", "hidden_totals", "key_average"}

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what a checkpoint does not store, or everything in a new model."""
        if isinstance(module, Balancer):
            module.discard()
        elif isinstance(module, SparseMemory):
            if not is_loaded(module.values):
                module.reset_parameters()
        elif hasattr(module, "weight") and not is_loaded(module.weight):
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> None:
        """Return ``None``: an embedding that is the output projection too is one parameter."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("hash tables and the embedding have a row for each token id")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        context_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Predict the next token at each position.

        Args:
            input_ids: (B, T) token ids, those of fairseq's dictionary. A text begins with ``</s>``,
                or with ``<s>`` if the model was trained with ``--add-bos-token``.
            attention_mask: (B, past and new positions), zero at padding.
            position_ids: (B, T) positions from 0; ``None``: counted over what is not padding.
            past_key_values, cache: past positions, under the earlier and the later name.
            context_ids: the token ids before ``input_ids``. ``generate`` passes them. Without it,
                they are needed with a cache if a layer selects by more than one token id.
            labels: (B, T) token ids to predict, shifted in here; -100 is not scored.
            use_cache: whether to return a cache.
            output_hidden_states: whether to return ``hidden_states``: the embeddings, the output of
                each layer but the last, and the input of the output projection, each (B, T, D).
            output_attentions: must not be set, because no attention weights are computed.
            logits_to_keep: number of positions at the end to compute logits of, or their indices;
                0: all.

        Returns:
            ``loss`` with labels, ``logits``, the cache, and ``aux_loss``. In training, ``aux_loss``
            is the weighted balance and z losses, and part of ``loss``.

        Raises:
            ValueError: see :meth:`~..decoder.Decoder.forward`, or an argument is not supported.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds: selectors read token ids; give input_ids")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions: scaled_dot_product_attention computes no attention weights"
            )
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        cache = past_key_values if cache is None else cache
        use_cache = not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        weights = self.config.balance_loss_weights, self.config.z_loss_weights
        losses = self.training and any(weights)
        output = self.decoder(
            *(input_ids, attention_mask, position_ids, cache, context_ids, losses),
            balance_scope=self.config.balance_loss_scope,
            keep_inputs=output_hidden_states,
        )
        kept: Any = logits_to_keep
        if not isinstance(kept, Tensor):
            kept = slice(-kept or None, None)
        logits = self.decoder.logits(output.features[:, kept])
        aux_loss = loss = None
        if losses:
            aux_loss = self._auxiliary_loss(output.memories, *weights)
        if labels is not None:
            counted = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **counted)
            loss = loss if aux_loss is None else loss + aux_loss
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=(*output.inputs, output.features) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )
        return result.to_tuple() if return_dict is False else result

    def _auxiliary_loss(self, memories: dict[int, Any], balance: Any, z: Any) -> Tensor:
        total = torch.zeros((), device=self.device)
        for number, found in memories.items():
            if weight := balance.get(str(number)):
                total = total + weight * found.balance_loss
            if weight := z.get(str(number)):
                total = total + weight * found.z_loss
        return total

    def end_update(self) -> None:
        """Move the biases that balance the load. Call it after each optimizer step.

        It does nothing for methods without such biases.
        """
        for memory in self.decoder.memories().values():
            memory.end_update()

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new = inputs["input_ids"].shape[1]
        inputs["context_ids"] = input_ids[:, : input_ids.shape[1] - new]
        return inputs

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mask of the tokens as it is: the decoder makes the causal one."""
        return kwargs.get("attention_mask")


def is_loaded(parameter: Any) -> bool:
    """Return whether transformers has loaded a parameter."""
    return bool(getattr(parameter, "_is_hf_initialized", False))
