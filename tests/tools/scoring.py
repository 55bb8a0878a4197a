"""Scores token by token, models of known scores, and files of requests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from torch import Tensor

from fairseq_sffn.tools.likelihood import Score, Scorer
from tests.models.small_lm import TYPES, dictionary

POSITIONS = 16
ROUNDING = 1e-5
"""Tolerance, as fairseq's softmax is in single precision."""
EOS, UNK = Dictionary().eos(), Dictionary().unk()


def scorer(model: Any, max_tokens: int = 100, types: int = TYPES, start: int = EOS) -> Scorer:
    return Scorer(model.eval(), dictionary(), start, types, max_tokens, torch.device("cpu"))


def plain_score(model: Any, tokens: list[int], scored: int, positions: int) -> Score:
    """Score a token at a time, from the logits at the end of a batch of one sequence."""
    sequence = [EOS, *tokens]
    first = len(sequence) - scored
    total, greedy = 0.0, True
    for i in range(first, len(sequence)):
        if scored <= positions:  # one window for all tokens
            begin = max(0, len(sequence) - 1 - positions)
        else:  # pieces of half of the positions, each with the context that fits
            piece_end = min(first + ((i - first) // (positions // 2) + 1) * (positions // 2), 10**9)
            begin = max(0, min(piece_end, len(sequence)) - 1 - positions)
        with torch.no_grad():
            logits = model(torch.tensor([sequence[begin:i]]))[0][0, -1].tolist()
        highest = max(logits)
        total += logits[sequence[i]] - highest
        total -= math.log(sum(math.exp(logit - highest) for logit in logits))
        greedy &= logits.index(highest) == sequence[i]
    return Score(total, greedy)


class Table(FairseqDecoder):
    """Predicts by the last token only, from logits (V, V)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(dictionary())
        self.logits = logits

    def forward(self, tokens: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.logits[tokens], None

    def max_positions(self) -> int:
        return POSITIONS


def rigged(follows: dict[int, int]) -> FairseqLanguageModel:
    """Build a model that gives ``follows[token]`` nine times the probability of all others
    together."""
    probabilities = torch.full((TYPES, TYPES), 1 / TYPES)
    for token, following in follows.items():
        probabilities[token] = 0.1 / (TYPES - 1)
        probabilities[token, following] = 0.9
    return FairseqLanguageModel(Table(probabilities.log()))


def write_task(folder: Path, task: str, documents: list[dict[str, Any]]) -> None:
    """Write documents with ``contexts``, ``continuations`` and ``label``, in the format of
    examples/data/zero_shot.sh."""
    folder.mkdir(exist_ok=True)
    lines = [
        {
            "request": {"context": context, "continuation": continuation},
            "doc_id": number,
            "idx": i,
            "label": document["label"],
        }
        for number, document in enumerate(documents)
        for i, (context, continuation) in enumerate(
            zip(document["contexts"], document["continuations"], strict=True)
        )
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{task}.jsonl").write_text(text)
