"""Zero-shot tasks: their documents, and the accuracy of a model on them.

The score of a choice is the log-likelihood of its continuation, given its context. ``accuracy`` is
the share of documents whose right choice has the highest score; the first of equal scores counts.
For ``accuracy_norm``, scores are divided by the number of characters of the choice. The two are
``acc`` and ``acc_norm`` of lm-evaluation-harness.

WinoGrande's choices are contexts with the same continuation, "partial evaluation" (Trinh and Le
2018, arXiv 1806.02847). A document of LAMBADA is right if every token of its last word is the most
likely one. ``perplexity`` is the perplexity of the last words.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .likelihood import Score

LAMBADA = "lambada"
TASKS = (
    *("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "sciq"),
    LAMBADA,
)


@dataclass(frozen=True)
class Document:
    """A document with all of its requests.

    Attributes:
        number: number of the document in its task.
        choices: (context, continuation) of each choice.
        label: index of the right choice.
    """

    number: int
    choices: tuple[tuple[str, str], ...]
    label: int


def read_documents(folder: Path, task: str) -> list[Document]:
    """Return the documents of a task in the order of their numbers.

    Args:
        folder: folder of the files ``TASK.jsonl``.
        task: name of the task.

    Raises:
        UsageError: the file is missing or empty, or a document is not well formed.
    """
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise UsageError(f"--requests {folder}: has no {path.name}")
    choices: dict[int, dict[int, tuple[str, str]]] = {}
    labels: dict[int, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            request = json.loads(line)
            pair = request["request"]["context"], request["request"]["continuation"]
            doc_id, choice = int(request["doc_id"]), int(request["idx"])
            # LAMBADA's label is the word. Its only choice is the right one.
            label = 0 if task == LAMBADA else int(request["label"])
            well_formed = (
                isinstance(pair[0], str)
                and pair[1].strip()
                and choice not in choices.setdefault(doc_id, {})
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            well_formed = False
        if not well_formed or labels.setdefault(doc_id, label) != label:
            raise UsageError(f"--requests {folder}: {path.name}, line {number} is no request")
        choices[doc_id][choice] = pair
    documents = []
    for doc_id in sorted(choices):
        of_document = choices[doc_id]
        if (
            sorted(of_document) != list(range(len(of_document)))
            or labels[doc_id] not in of_document
        ):
            raise UsageError(f"--requests {folder}: {path.name}, document {doc_id} lacks requests")
        pairs = tuple(of_document[choice] for choice in range(len(of_document)))
        documents.append(Document(doc_id, pairs, labels[doc_id]))
    if not documents:
        raise UsageError(f"--requests {folder}: {path.name} is empty")
    return documents


def draw(documents: list[Document], task: str, count: int, seed: int) -> list[Document]:
    """Draw documents at random, and return them in their order.

    The draw depends only on the seed, the task and the documents' numbers. A smaller draw is part
    of a larger one.

    Args:
        documents: all documents.
        task: name of the task.
        count: number of documents to draw. If there are fewer, all are returned.
        seed: seed of the draw.
    """

    def rank(document: Document) -> bytes:
        return hashlib.sha256(f"{seed} {task} {document.number}".encode()).digest()

    drawn = sorted(documents, key=rank)[:count]
    return sorted(drawn, key=lambda document: document.number)


def subset_hash(documents: list[Document]) -> str:
    """Return a short hash of the numbers of documents."""
    numbers = "\n".join(str(document.number) for document in documents)
    return hashlib.sha256(numbers.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Figures:
    """Results of a model on a task.

    Attributes:
        accuracy: share of documents that are right.
        standard_error: standard error of ``accuracy``; ``None`` for one document.
        accuracy_norm: accuracy of the scores per character; ``None`` for LAMBADA.
        standard_error_norm: standard error of ``accuracy_norm``.
        random: expected accuracy of random guessing.
        perplexity: perplexity of the last words of LAMBADA, per word; ``None`` for other tasks.
    """

    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None
    standard_error_norm: float | None
    random: float
    perplexity: float | None


def choice_figures(documents: list[Document], scores: list[list[Score]]) -> Figures:
    """Return the figures of a multiple-choice task.

    Args:
        documents: documents of the task.
        scores: scores of the choices of each document.
    """
    right = right_norm = 0
    for document, of_choices in zip(documents, scores, strict=True):
        raw = [score.log_likelihood for score in of_choices]
        # lm-evaluation-harness counts characters, without the space before them.
        lengths = [len(text.removeprefix(" ")) for _, text in document.choices]
        norm = [score / length for score, length in zip(raw, lengths, strict=True)]
        right += raw.index(max(raw)) == document.label
        right_norm += norm.index(max(norm)) == document.label
    count = len(documents)
    return Figures(
        accuracy=right / count,
        standard_error=standard_error(right / count, count),
        accuracy_norm=right_norm / count,
        standard_error_norm=standard_error(right_norm / count, count),
        random=sum(1 / len(document.choices) for document in documents) / count,
        perplexity=None,
    )


def word_figures(scores: list[Score], types: int) -> Figures:
    """Return the figures of LAMBADA.

    Args:
        scores: scores of the documents' last words.
        types: number of types that the model predicts.
    """
    count = len(scores)
    accuracy = sum(score.greedy for score in scores) / count
    mean = sum(score.log_likelihood for score in scores) / count
    return Figures(
        accuracy=accuracy,
        standard_error=standard_error(accuracy, count),
        accuracy_norm=None,
        standard_error_norm=None,
        random=1 / types,
        perplexity=math.exp(min(-mean, 700)),  # about as much as a float holds
    )


def standard_error(share: float, count: int) -> float | None:
    """Return the standard error of a share of ``count`` documents; ``None`` for one document."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def task_figures(task: str, documents: list[Document], scores: list[Score], types: int) -> Figures:
    """Return the figures of a task.

    Args:
        task: name of the task.
        documents: documents of the task.
        scores: scores of all requests, one document after another.
        types: number of types that the model predicts.
    """
    if task == LAMBADA:
        return word_figures(scores, types)
    remaining: Iterator[Score] = iter(scores)
    by_document = [[next(remaining) for _ in document.choices] for document in documents]
    return choice_figures(documents, by_document)
