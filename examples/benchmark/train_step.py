"""A whole training step of fairseq-train: each method's `_tiny` model against the dense one.

Model, criterion, optimizer and Trainer are built from the arguments of the command that each row
shows, and `Trainer.train_step` is what fairseq-train calls for each update. Only reading data is
left out: a batch of random tokens with Zipf's frequencies is used again and again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from omegaconf import DictConfig
from timing import Work, arguments, compare, run_part

import fairseq_sffn  # noqa: F401  (registers the models)
from fairseq_sffn.models.transformer_lm import METHODS

VOCABULARY = 4000
CONTEXT, SENTENCES = 128, 32  # 4096 tokens an update
NAMES = tuple(method.name for method in METHODS if method.selector)
RUNS = (("avgk", "adam"), *((name, "sffn_adam") for name in NAMES))


def flags(model: str, optimizer: str, context: int, sentences: int, more: str = "") -> list[str]:
    """Arguments of fairseq-train after the data."""
    return (
        f"--user-dir fairseq_sffn --task language_modeling --arch transformer_lm_{model}_tiny "
        f"--criterion sffn_cross_entropy --optimizer {optimizer} --adam-betas 0.9,0.98 "
        f"--clip-norm 1.0 --lr 1e-3 --tokens-per-sample {context} --batch-size {sentences} "
        f"--max-update 1000 --cpu {more}"
    ).split()


def training_config(
    model: str,
    optimizer: str,
    data: str = "DATA",
    context: int = CONTEXT,
    sentences: int = SENTENCES,
    more: str = "",
) -> DictConfig:
    """What fairseq-train makes of its arguments."""
    asked = flags(model, optimizer, context, sentences, more)[2:]  # the plugin is imported already
    parser = options.get_training_parser()
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [data, *asked]))


def write_dictionary(folder: Path) -> None:
    """All that is read of the data."""
    words = "".join(f"w{i} {VOCABULARY // (i + 1) + 1}\n" for i in range(VOCABULARY - 4))
    Path(folder, "dict.txt").write_text(words)


def random_batch(context: int, sentences: int) -> dict[str, Any]:
    """As fairseq's language modelling data gives one."""
    frequency = 1 / torch.arange(1, VOCABULARY - 3).float()
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


def build_trainer(config: DictConfig) -> Trainer:
    """As fairseq-train does, before the first update."""
    task = tasks.setup_task(config.task)
    model, criterion = task.build_model(config.model), task.build_criterion(config.criterion)
    trainer = Trainer(config, task, model, criterion)
    trainer.begin_epoch(1)
    return trainer


def measure(
    repeats: int,
    runs: tuple[tuple[str, str], ...] = RUNS,
    context: int = CONTEXT,
    sentences: int = SENTENCES,
) -> list[dict[str, Any]]:
    """A JSON row for each of ``runs``, with ``ratio`` to dense with the same optimizer."""
    batch = random_batch(context, sentences)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_dictionary(Path(folder))

        def step(model: str, optimizer: str) -> Work:
            config = training_config(model, optimizer, folder, context, sentences)
            trainer = build_trainer(config)
            # Metrics are the process's, and models differ in theirs.
            return Work(lambda: trainer.train_step([batch]), prepare=metrics.reset)

        for optimizer in dict.fromkeys(name for _, name in runs):
            models = [model for model, its in runs if its == optimizer]
            works = {model: step(model, optimizer) for model in models}
            label = f"training steps with {optimizer}"
            timed = compare(step("dense", optimizer), works, repeats, label)
            for model, figures in timed.items():
                seconds = figures["seconds"]["median"]
                asked = " ".join(flags(model, optimizer, context, sentences))
                rows.append(
                    {
                        "model": model,
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
    args = arguments(__doc__).parse_args(argv)
    run_part("train_step", args, lambda: measure(args.repeats))


if __name__ == "__main__":
    main()
