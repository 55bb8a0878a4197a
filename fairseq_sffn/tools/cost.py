"""What a model costs: parameters and FLOPs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fairseq import checkpoint_utils
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules import AdaptiveInput

from ..memory import SparseMemory


@dataclass(frozen=True)
class Cost:
    """What a language model costs.

    Attributes:
        params: trained parameters, tied ones once.
        active_params: parameters that one token touches, its selectors' and all embeddings
            included.
        flops_per_token: of one forward pass, a multiply-add counted as 2: the matrix products of
            attention (with scores against ``context`` positions), FFNs and vocabulary projection,
            and the selection of blocks.
    """

    params: int
    active_params: int
    flops_per_token: int


def model_cost(model: TransformerLanguageModel, context: int) -> Cost:
    """Cost of a language model.

    Args:
        model: one of ours or fairseq's ``transformer_lm``.
        context: tokens that a token attends to.

    Raises:
        ValueError: the model has adaptive embeddings, whose cost depends on the token.
    """
    decoder = model.decoder
    if isinstance(decoder.embed_tokens, AdaptiveInput) or decoder.adaptive_softmax is not None:
        raise ValueError("the cost of adaptive embeddings depends on the token")
    params = sum(parameter.numel() for parameter in model.parameters())
    memories = [module for module in model.modules() if isinstance(module, SparseMemory)]
    idle = sum(memory.config.num_params() - memory.config.active_params() for memory in memories)
    width = decoder.embed_dim
    flops = sum(memory.config.flops_per_token() for memory in memories)
    for layer in decoder.layers:
        flops += 8 * width * width + 4 * context * width
        if hasattr(layer.fc1, "weight"):
            flops += 2 * layer.fc1.weight.numel() + 2 * layer.fc2.weight.numel()
    flops += 2 * decoder.output_projection.weight.numel()
    return Cost(params, params - idle, flops)


def checkpoint_cost(path: str) -> dict[str, Any]:
    """Cost of the model in a checkpoint, at the context it was trained with, as a dictionary.

    Raises:
        UsageError: the file is no checkpoint, or holds code.
    """
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([path])
    return asdict(model_cost(models[0], task.args.tokens_per_sample))
