"""Makes tasks of lm-evaluation-harness from the requests that examples/data/zero_shot.sh fetched.

    python examples/zero_shot/lm_eval_tasks.py --requests runs/data/zero_shot --output runs/lm_eval

Writes to --output: TASK.jsonl, one document a line, and TASK.yaml, for `lm_eval --include_path
OUTPUT --tasks zero_shot`, which evaluates all, or `--tasks zero_shot_TASK`. They need no network,
and work with every model of the harness. The documents, and those drawn with --documents and
--seed, are those of `fairseq-sffn zero-shot`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools.zero_shot import parse_tasks
from fairseq_sffn.tools.zero_shot_tasks import LAMBADA, TASKS, Document, draw, read_documents

VERSION = 1.0
"""Version of the tasks, which the harness prints."""
DELIMITER = " "
"""The harness puts it between context and choice. ``acc_norm`` does not count it."""


def without_delimiter(text: str, task: str) -> str:
    """Return a continuation without the space that the harness adds.

    Raises:
        UsageError: the continuation does not begin with a space.
    """
    if not text.startswith(DELIMITER):
        raise UsageError(f"{task}: the continuation {text!r} does not begin with a space")
    return text.removeprefix(DELIMITER)


def harness_document(document: Document, task: str) -> dict[str, Any]:
    """Return a document in the form of the harness.

    The choices are continuations of one context, or contexts of one continuation (WinoGrande).

    Raises:
        UsageError: the choices are neither.
    """
    contexts, continuations = zip(*document.choices, strict=True)
    fields = {"number": document.number, "label": document.label}
    if task == LAMBADA:
        return fields | {"context": contexts[0], "continuation": continuations[0]}
    if len(set(contexts)) == 1:
        choices = [without_delimiter(text, task) for text in continuations]
        return fields | {"context": contexts[0], "choices": choices}
    if len(set(continuations)) == 1:
        continuation = without_delimiter(continuations[0], task)
        return fields | {"contexts": list(contexts), "continuation": continuation}
    raise UsageError(f"{task}: document {document.number} has several contexts and continuations")


def metric(name: str, aggregation: str, higher_is_better: bool = True) -> dict[str, Any]:
    """Return the entry of a metric in a task's configuration."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def configuration(task: str, form: set[str], data: Path) -> dict[str, Any]:
    """Return the configuration of a task.

    Args:
        task: name of the task.
        form: the fields of its documents.
        data: file of its documents.
    """
    common = {
        "task": f"zero_shot_{task}",
        "tag": "zero_shot",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": DELIMITER,
        "metadata": {"version": VERSION},
    }
    accuracy = metric("acc", "mean")
    if task == LAMBADA:
        own: dict[str, Any] = {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "continuation",
            "metric_list": [accuracy, metric("perplexity", "perplexity", False)],
        }
    elif "contexts" in form:
        # The choices are contexts, whose lengths say nothing: no acc_norm, as in the harness.
        own = {
            "output_type": "multiple_choice",
            "doc_to_text": "label",
            "doc_to_choice": "contexts",
            "doc_to_target": "continuation",
            "metric_list": [accuracy],
        }
    else:
        own = {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [accuracy, metric("acc_norm", "mean")],
        }
    return common | own


def write_task(documents: list[Document], task: str, output: Path) -> None:
    """Write the two files of a task.

    Raises:
        UsageError: the documents do not all have one form.
    """
    lines = [harness_document(document, task) for document in documents]
    form = set(lines[0])
    if any(set(line) != form for line in lines):
        raise UsageError(f"{task}: some documents have several contexts, others one")
    data = output / f"{task}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # JSON is YAML, too.
    text = json.dumps(configuration(task, form, data), indent=2)
    (output / f"{task}.yaml").write_text(text + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--requests", type=Path, required=True, help="folder that examples/data/zero_shot.sh made"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument(
        "--documents", type=int, help="documents drawn from each task (default: all)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw (default: 1)")
    args = parser.parse_args(argv)
    if args.documents is not None and args.documents < 1:
        raise UsageError(f"--documents {args.documents}: must be at least 1")
    if not args.requests.is_dir():
        raise UsageError(f"--requests {args.requests}: there is no such folder")
    args.output.mkdir(parents=True, exist_ok=True)
    for task in parse_tasks(args.tasks):
        documents = read_documents(args.requests, task)
        count = len(documents) if args.documents is None else args.documents
        drawn = draw(documents, task, count, args.seed)
        write_task(drawn, task, args.output)
        print(f"zero_shot_{task}: {len(drawn):,} documents", file=sys.stderr)


if __name__ == "__main__":
    main()
