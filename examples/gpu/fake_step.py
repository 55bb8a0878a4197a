"""Runs a language model's training step over CUDA tensors without numbers, as ``fake_cuda.py``."""

import copy
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import recorder
import torch
from fairseq import optim
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.optim.fp16_optimizer import FP16Optimizer
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf
from recorder import KINDS, WAITS_OF, Outcome

from fairseq_sffn.criterions.sffn_cross_entropy import (
    SFFNCrossEntropyConfig,
    SFFNCrossEntropyCriterion,
)
from fairseq_sffn.memory.selection import Selector
from fairseq_sffn.tools.language_model import build_language_model

TYPES, PAD = 1000, 1
MOST_LAUNCHES = {"tiny": 1500, "gpt3_medium": 6000}
"""Largest number of kernels of a step, with losses and optimizer, by size of the model."""


@dataclass
class Step:
    """A training step and how it is computed."""

    method: str
    size: str
    kind: str
    flags: str = ""
    padding: bool = True

    def __str__(self) -> str:
        words = [f"training step of {self.method}_{self.size}", self.kind, self.flags]
        return " ".join(filter(None, [*words, "padding" * self.padding]))


def steps(quick: bool) -> Iterator[Step]:
    """Yield the paper's model with blocks of 64 and 16 cells, and a small model of each method.

    Half of the methods train in bf16, half in fp16, and all with autocast.

    Args:
        quick: leave out most of them.
    """
    for block_size, kinds in (
        (64, ("bf16",) if quick else ("bf16", "fp16", "autocast bf16", "autocast fp16")),
        (16, () if quick else ("bf16", "autocast fp16")),
    ):
        for kind in kinds:
            flags = f"--sffn-block-size {block_size}"
            yield Step("avgk", "gpt3_medium", kind, flags, padding=False)
    for i, method in enumerate(() if quick else sorted(Selector.registry)):
        for kind in (("bf16", "fp16")[i % 2], "autocast bf16"):
            yield Step(method, "tiny", kind)
    yield Step("switch", "tiny", "bf16", "--sffn-capacity-factor 1.25")
    yield Step("avgk", "tiny", "bf16", "--checkpoint-activations")
    yield Step("avgk", "tiny", "bf16", "--sffn-glu silu --sffn-shared-blocks 1")


def run(step: Step) -> Outcome:
    """Run forward, losses, backward and update."""
    # Two of the four layers of the small models are sparse.
    outcome = Outcome(str(step), MOST_LAUNCHES[step.size], 2 * WAITS_OF.get(step.method, 0))
    record = recorder.Recorder(answer=step.padding)
    dtype, autocast = KINDS[step.kind]
    context = 2048 if step.size == "gpt3_medium" else 128
    arch = f"transformer_lm_{step.method}_{step.size}"
    model = copy.deepcopy(build(arch, context, step.flags))
    criterion = build_criterion(Selector.registry[step.method])
    with recorder.fake_cuda():
        try:
            recorder.to_cuda(model, dtype)
            tokens = torch.full((4, context), PAD + 1, device="cuda")
            sample = {
                "net_input": {"src_tokens": tokens, "src_lengths": tokens[:, 0]},
                "target": tokens,
                "ntokens": tokens.numel(),
                "nsentences": len(tokens),
            }
            optimizer = build_optimizer(list(model.parameters()), step.kind)
            with record:
                with torch.autocast("cuda", autocast) if autocast else nullcontext():
                    loss, sample_size, _ = criterion(model, sample)
                optimizer.backward(loss)
                optimizer.multiply_grads(1 / sample_size)
                optimizer.clip_grad_norm(1.0)
                optimizer.step()
        except Exception as error:  # reported as a row
            outcome.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    outcome.take(record)
    return outcome


@functools.cache
def build(arch: str, context: int, flags: str) -> TransformerLanguageModel:
    """Build a model that several steps copy."""
    return build_language_model(arch, TYPES, context, flags.split())


def build_criterion(selector: type[Selector]) -> SFFNCrossEntropyCriterion:
    """Build cross entropy, with the balance and z losses that the selector has."""
    dictionary = Dictionary()
    for i in range(TYPES - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    task = LanguageModelingTask(OmegaConf.create({}), dictionary)
    weight = 0.01 if selector.scores_blocks else 0.0
    config = SFFNCrossEntropyConfig(
        balance_loss_weight=weight if selector.selects_by_scores else 0.0,
        z_loss_weight=weight,
        sentence_avg=False,
        distributed_world_size=1,
        ddp_backend="c10d",
        log_format=None,
        tensorboard_logdir=None,
    )
    return SFFNCrossEntropyCriterion(config, task)


def build_optimizer(parameters: list[torch.nn.Parameter], kind: str) -> Any:
    """Build the optimizer as fairseq's trainer does for ``--bf16`` and ``--fp16``; plain
    otherwise."""
    adam = {
        "_name": "sffn_adam",
        "lr": [1e-3],
        "adam_betas": "(0.9, 0.98)",
        "adam_eps": 1e-8,
        "weight_decay": 0.01,
        "use_old_adam": False,
        "fp16_adam_stats": False,
        "tpu": False,
    }
    if kind not in ("bf16", "fp16"):
        return optim.build_optimizer(OmegaConf.create(adam), parameters)
    config = {
        "optimizer": adam,
        "common": {
            "bf16": kind == "bf16",
            "on_cpu_convert_precision": False,
            "fp16_init_scale": 128,
            "fp16_scale_window": 1,
            "fp16_scale_tolerance": 0.0,
            "threshold_loss_scale": None,
            "min_loss_scale": 1e-4,
            "fp16_no_flatten_grads": False,
            "tpu": False,
        },
        "optimization": {"update_freq": [1]},
        "distributed_training": {"distributed_world_size": 1, "ddp_backend": "c10d"},
    }
    optimizer = FP16Optimizer.build_optimizer(OmegaConf.create(config), parameters)
    if optimizer.scaler is not None:
        optimizer.scaler.check_overflow = lambda norm: None  # no number is infinite here
    return optimizer
