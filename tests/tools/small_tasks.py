"""A small folder for zero-shot tasks: requests, a SentencePiece model, data and trained models."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

from fairseq_sffn.tools.zero_shot_tasks import TASKS
from tests import commands
from tests.tools.scoring import write_task

WORDS = ("union", "congress", "law", "peace", "war", "tariff", "people", "nation")


def zero_shot_folder(folder: Path, *models: str) -> Path:
    """Make requests, an encoder and data in a folder, and train models."""
    lines = [
        f"the {WORDS[i % 8]} of the {WORDS[(3 * i + 1) % 8]} is a {WORDS[(5 * i + 2) % 8]} ."
        for i in range(200)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "Question: Answer:"]),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 90, "bos_id": -1, "eos_id": -1, "num_threads": 1},
        **{"minloglevel": 2, "hard_vocab_limit": False, "character_coverage": 1.0},
    )
    (folder / "spm.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    encoded = [" ".join(pieces.encode(line, out_type=str)) for line in lines]
    for split, part in (("train", encoded), ("valid", encoded[:20])):
        (folder / split).write_text("\n".join(part) + "\n")
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", folder / "bin"),
        *("--trainpref", folder / "train", "--validpref", folder / "valid"),
    )
    for name in models:
        commands.train(folder / "bin", folder / name, name, "--max-update", "2")
    choices = [
        {
            "contexts": [f"Question: the {WORDS[i % 8]} of{' the law of' * i}\nAnswer:"] * 4,
            "continuations": [f" {WORDS[(i + k) % 8]}" + " of the" * k for k in range(4)],
            "label": i % 4,
        }
        for i in range(12)
    ]
    for task in TASKS[:7]:
        write_task(folder / "requests", task, choices)
    subjects = [
        {
            "contexts": [f"the {WORDS[i]}", f"the {WORDS[i + 1]}"],
            "continuations": [" is a war ."] * 2,
            "label": (i + i // 2) % 2,
        }
        for i in range(6)
    ]
    write_task(folder / "requests", "winogrande", subjects)
    texts = [
        {"contexts": ["the law of the"], "continuations": [f" {word}"], "label": [word]}
        for word in WORDS
    ]
    write_task(folder / "requests", "lambada", texts)
    return folder
