"""Measures a training step of fairseq-train: each method's model against the dense one.

Model, criterion, optimizer and Trainer are built from the command line that each row shows.
fairseq-train calls `Trainer.train_step` for each update. Only reading data is left out: every step
trains on the same batch of random tokens, drawn by Zipf's law.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from omegaconf import DictConfig
from timing import CPU, Place, Work, arguments, compare, place_of, run_part

import fairseq_sffn  # noqa: F401  (registers the models)
from fairseq_sffn.models.transformer_lm import METHODS
from fairseq_sffn.patches.trainer import SFFNTrainer

VOCABULARY = 4000
CONTEXT, SENTENCES = 128, 32  # 4096 tokens an update
NAMES = tuple(method.name for method in METHODS if method.selector)
RUNS = (("avgk", "adam"), *((name, "sffn_adam") for name in NAMES))
SIZES = ("tiny", "gpt3_medium")
PRECISION_FLAGS = {"fp32": "", "bf16": "--bf16", "fp16": "--fp16"}


def flags(
    model: str,
    optimizer: str,
    context: int,
    sentences: int,
    more: str = "",
    size: str = "tiny",
    place: Place = CPU,
) -> list[str]:
    """Return the arguments of fairseq-train after the data."""
    where = "--cpu" if place.device == "cpu" else "--distributed-world-size 1"
    return (
        f"--user-dir fairseq_sffn --task language_modeling --arch transformer_lm_{model}_{size} "
        f"--criterion sffn_cross_entropy --optimizer {optimizer} --adam-betas 0.9,0.98 "
        f"--clip-norm 1.0 --lr 1e-3 --tokens-per-sample {context} --batch-size {sentences} "
        f"--max-update 1000 {where} {PRECISION_FLAGS[place.dtype]} {more}"
    ).split()


def training_config(
    model: str,
    optimizer: str,
    data: str = "DATA",
    context: int = CONTEXT,
    sentences: int = SENTENCES,
    more: str = "",
    size: str = "tiny",
    place: Place = CPU,
) -> DictConfig:
    """Return the configuration that fairseq-train makes of its arguments."""
    asked = flags(model, optimizer, context, sentences, more, size, place)
    asked = asked[2:]  # the plugin is imported already
    parser = options.get_training_parser()
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [data, *asked]))


def write_dictionary(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """Write the dictionary, the only file of the data that is read."""
    words = "".join(f"w{i} {vocabulary // (i + 1) + 1}\n" for i in range(vocabulary - 4))
    Path(folder, "dict.txt").write_text(words)


def random_batch(context: int, sentences: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Make a batch in the form of fairseq's language modelling data."""
    frequency = 1 / torch.arange(1, vocabulary - 3).float()
    tokens = 4 + frequency.multinomial(sentences * (context + 1), replacement=True)
    tokens = tokens.view(sentences, context + 1)
    source, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    lengths = torch.full((sentences,), context)
    return {
        "id": torch.arange(sentences),
        "nsentences": sentences,
        "ntokens": source.numel(),
        "net_input": {"src_tokens": source, "src_lengths": lengths},
        "target": target,
    }


def build_trainer(config: DictConfig) -> SFFNTrainer:
    """Build a Trainer as fairseq-train does, ready for the first update."""
    task = tasks.setup_task(config.task)
    model, criterion = task.build_model(config.model), task.build_criterion(config.criterion)
    trainer = SFFNTrainer(config, task, model, criterion)
    trainer.begin_epoch(1)
    return trainer


def measure(
    repeats: int,
    runs: tuple[tuple[str, str], ...] = RUNS,
    context: int = CONTEXT,
    sentences: int = SENTENCES,
    size: str = "tiny",
    place: Place = CPU,
    vocabulary: int = VOCABULARY,
) -> list[dict[str, Any]]:
    """Return a JSON row for each of ``runs``, with the ``ratio`` to dense with the same
    optimizer."""
    batch = random_batch(context, sentences, vocabulary)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_dictionary(Path(folder), vocabulary)
        sizes: dict[str, Any] = {"size": size, "place": place}

        def step(model: str, optimizer: str) -> Work:
            config = training_config(model, optimizer, folder, context, sentences, **sizes)
            trainer = build_trainer(config)
            # Metrics belong to the process, and models differ in theirs.
            return Work(lambda: trainer.train_step([batch]), prepare=metrics.reset)

        for optimizer in dict.fromkeys(name for _, name in runs):
            models = [model for model, its in runs if its == optimizer]
            works = {model: step(model, optimizer) for model in models}
            label = f"training steps with {optimizer}"
            dense = step("dense", optimizer)
            timed = compare(dense, works, repeats, label, device=place.device)
            for model, figures in timed.items():
                seconds = figures["seconds"]["median"]
                asked = " ".join(flags(model, optimizer, context, sentences, **sizes))
                rows.append(
                    {
                        **place.describe(),
                        "model": model,
                        "size": size,
                        "optimizer": optimizer,
                        **figures,
                        "tokens_per_second": batch["ntokens"] / seconds,
                        "dense_tokens_per_second": batch["ntokens"]
                        / figures["base_seconds"]["median"],
                        "stands_for": f"fairseq-train DATA {asked}",
                    }
                )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, places=True)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--models", nargs="+", choices=NAMES, help="default: all")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    args = parser.parse_args(argv)
    place = place_of(args)
    if args.dtype == "fp16" and args.device == "cpu":
        sys.exit("--dtype fp16: fairseq-train needs --device cuda for it")
    runs = tuple(run for run in RUNS if args.models is None or run[0] in args.models)
    sizes = args.context, args.sentences, args.size
    run_part("train_step", args, lambda: measure(args.repeats, runs, *sizes, place))


if __name__ == "__main__":
    main()
