"""Evaluate a language model on zero-shot tasks: HellaSwag, PIQA, WinoGrande, ARC, ..."""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, models, registry
from fairseq.data import Dictionary, encoders
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import FairseqLanguageModel
from omegaconf import MISSING

from ..checkpoints.loading import add_flags_to
from ..errors import UsageError
from ..memory import SparseMemory
from ..models.config import flag
from .likelihood import Encoder, Scorer
from .zero_shot_report import format_report
from .zero_shot_tasks import TASKS, draw, read_documents, subset_hash, task_figures

FILES = (
    *("sentencepiece_model", "gpt2_encoder_json", "gpt2_vocab_bpe", "bpe_codes", "bpe_merges"),
    "bpe_vocab",
)
"""Options of fairseq's encoders that name a file."""
MAX_UNKNOWN = 0.5
"""Largest share of tokens outside the dictionary. Above it, the encoder is not the model's."""


def load_model(
    checkpoint: Path, data: Path, overrides: dict[str, Any]
) -> tuple[FairseqLanguageModel, Any]:
    """Load a trained model and its task, as ``fairseq-eval-lm`` does.

    Args:
        checkpoint: the model's checkpoint, sharded or not.
        data: folder with the model's ``dict.txt``.
        overrides: option of the model or task -> value.

    Returns:
        The model in evaluation mode, and the task.

    Raises:
        UsageError: the model cannot be loaded, or cannot be scored. The message names the flag and
            the value.
    """
    if not (data / "dict.txt").is_file():
        raise UsageError(f"--data {data}: has no dict.txt")
    overrides = {**overrides, "data": str(data)}
    state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint), overrides)
    arch = state["cfg"].model._name
    model_class = models.ARCH_MODEL_REGISTRY.get(arch) or models.MODEL_REGISTRY[arch]
    if not issubclass(model_class, FairseqLanguageModel):
        raise UsageError(f"checkpoint {checkpoint}: holds no language model, but a {arch}")
    types = len(Dictionary.load(str(data / "dict.txt")))
    embedding = state["model"].get("decoder.embed_tokens.weight")
    if embedding is not None and len(embedding) != types:
        raise UsageError(
            f"--data {data}: its dict.txt makes {types} types, the model has {len(embedding)}"
        )
    try:
        loaded = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], state=state)
    except Exception as error:  # fairseq's own models say in many ways that something does not fit
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"checkpoint {checkpoint} with --data {data}: {reason}") from error
    model, task = loaded[0][0], loaded[2]
    for module in model.modules():
        if isinstance(module, SparseMemory) and module.config.eval_capacity_factor:
            raise UsageError(
                f"checkpoint {checkpoint}: --sffn-eval-capacity-factor "
                f"{module.config.eval_capacity_factor} lets documents compete for room; give "
                "--model-overrides \"{'sffn_eval_capacity_factor': 0}\""
            )
    return model.eval(), task


def encoder_parser(name: str, prog: str = "fairseq-sffn zero-shot") -> argparse.ArgumentParser:
    """Return the parser of the flags of one of fairseq's encoders.

    Args:
        name: name of the encoder, as for ``--bpe``.
        prog: the command, for messages.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s CHECKPOINT ... --bpe {name} [flags of the encoder]",
        add_help=False,
        allow_abbrev=False,
    )
    dataclasses = registry.REGISTRIES["bpe"]["dataclass_registry"]
    if name in dataclasses:
        gen_parser_from_dataclass(parser, dataclasses[name]())
    return parser


def build_encoder(name: str, flags: list[str]) -> Any:
    """Return one of fairseq's encoders.

    Args:
        name: name of the encoder, as for ``--bpe``.
        flags: flags of the encoder.

    Raises:
        UsageError: the encoder cannot be built. The message names the flag and the value.
    """
    options = vars(encoder_parser(name).parse_args(flags))
    return encoder_of(name, options, " ".join(["--bpe", name, *flags]))


def encoder_of(name: str, options: dict[str, Any], what: str) -> Any:
    """Return one of fairseq's encoders.

    Args:
        name: name of the encoder, as for ``--bpe``.
        options: all options of the encoder.
        what: the encoder, for the message.

    Raises:
        UsageError: the encoder cannot be built. The message names the flag and the value.
    """
    for option, value in options.items():
        if value == MISSING:
            raise UsageError(f"{flag(option)}: is required by --bpe {name}")
        if option in FILES and value and "://" not in value and not Path(value).is_file():
            raise UsageError(f"{flag(option)} {value}: there is no such file")
    try:
        return encoders.build_bpe(argparse.Namespace(bpe=name, **options))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{what}: {reason}") from error


def build_scorer(
    checkpoint: Path, data: Path, overrides: dict[str, Any], max_tokens: int, device: torch.device
) -> Scorer:
    """Load a trained model, and return its scorer. See :func:`load_model`.

    Args:
        max_tokens: tokens of a batch, padding included.
        device: where the model runs.
    """
    model, task = load_model(checkpoint, data, overrides)
    dictionary = task.source_dictionary
    return Scorer(
        model.to(device),
        dictionary,
        # The start of a text, as in LanguageModelingTask.inference_step.
        start=dictionary.bos() if task.args.add_bos_token else dictionary.eos(),
        types=len(task.target_dictionary),
        max_tokens=max_tokens,
        device=device,
    )


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sffn zero-shot``. :func:`run` parses the encoder's own flags."""
    parser.add_argument("checkpoint", type=Path, help="the .pt file, sharded or not")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the model's dict.txt, as in training"
    )
    parser.add_argument(
        "--requests",
        type=Path,
        required=True,
        help="folder of TASK.jsonl, as examples/data/zero_shot.sh makes it",
    )
    parser.add_argument(
        "--bpe",
        required=True,
        choices=sorted(encoders.BPE_REGISTRY),
        help="encoder of the training text, as for fairseq-interactive",
    )
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help="tasks, separated by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--documents", type=int, default=1000, help="documents drawn from each task (default: 1000)"
    )
    parser.add_argument("--full", action="store_true", help="use all documents of each task")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw (default: 1)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="tokens in a batch, with padding (default: 4096)",
    )
    parser.add_argument(
        "--model-overrides", default="{}", metavar="DICT", help="as for fairseq-eval-lm"
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags_to(parser)
    parser.epilog = (
        "Every other flag is the encoder's, such as --sentencepiece-model FILE, or "
        "--gpt2-encoder-json FILE --gpt2-vocab-bpe FILE, and comes after CHECKPOINT. Scores are "
        "log-likelihoods of the choices, also divided by the number of characters."
    )
    parser.set_defaults(other_flags=[])


def run(args: argparse.Namespace) -> str:
    """Return what ``fairseq-sffn zero-shot`` prints.

    Raises:
        UsageError: see :func:`evaluate`.
    """
    report = evaluate(args)
    return json.dumps(report, indent=2) if args.json else format_report(report)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every task, and the settings that they depend on.

    All requests are read and encoded before the model scores any.

    Raises:
        UsageError: a flag has a wrong value, or names something that cannot be read. The message
            names the flag and the value.
    """
    for name in ("documents", "max_tokens"):
        if getattr(args, name) < 1:
            raise UsageError(f"{flag(name)} {getattr(args, name)}: must be at least 1")
    overrides = parse_overrides(args.model_overrides)
    tasks = parse_tasks(args.tasks)
    if not args.requests.is_dir():
        raise UsageError(f"--requests {args.requests}: there is no such folder")
    documents = {task: read_documents(args.requests, task) for task in tasks}
    bpe = build_encoder(args.bpe, args.other_flags)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    scorer = build_scorer(args.checkpoint, args.data, overrides, args.max_tokens, device)
    encoder = Encoder(bpe, scorer.dictionary)
    drawn = {
        task: everything if args.full else draw(everything, task, args.documents, args.seed)
        for task, everything in documents.items()
    }
    requests = {
        task: [
            encoder.encode_pair(*choice) for document in drawn[task] for choice in document.choices
        ]
        for task in tasks
    }
    for task in tasks:
        check_known(requests[task], scorer.dictionary.unk(), f"--bpe {args.bpe}: {task}", args.data)
    report = []
    for task in tasks:
        scores = scorer.score(requests[task], progress=Progress(task))
        if any(math.isnan(score.log_likelihood) for score in scores):
            raise UsageError(f"checkpoint {args.checkpoint}: predicts what is not a number")
        figures = task_figures(task, drawn[task], scores, scorer.types)
        report.append(
            {
                "task": task,
                "documents": len(drawn[task]),
                "documents_of_task": len(documents[task]),
                **asdict(figures),
                "requests": len(requests[task]),
                "cut_requests": sum(scorer.is_cut(tokens) for tokens, _ in requests[task]),
                "requests_in_pieces": sum(
                    scorer.is_in_pieces(scored) for _, scored in requests[task]
                ),
                "subset": subset_hash(drawn[task]),
            }
        )
    return {"checkpoint": str(args.checkpoint), "seed": args.seed, "tasks": report}


def parse_tasks(names: str) -> list[str]:
    """Return the tasks that ``--tasks`` names, each once.

    Raises:
        UsageError: a task is unknown.
    """
    tasks = list(dict.fromkeys(names.split(",")))
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"--tasks {names}: {task!r} is none of {', '.join(TASKS)}")
    return tasks


def parse_overrides(text: str) -> dict[str, Any]:
    """Return the dictionary that ``--model-overrides`` gives.

    Raises:
        UsageError: the text is not a dictionary.
    """
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        overrides = None
    if not isinstance(overrides, dict):
        raise UsageError(f"--model-overrides {text}: is no dictionary")
    return overrides


def check_known(requests: list[tuple[list[int], int]], unknown: int, what: str, data: Path) -> None:
    """Check that most of the tokens are in the dictionary.

    Otherwise the dictionary belongs to another encoder, and the scores would be those of ``<unk>``.

    Args:
        requests: results of :meth:`~.likelihood.Encoder.encode_pair`.
        unknown: id of ``<unk>``.
        what: what was encoded, for the message.
        data: folder of the dictionary, for the message.

    Raises:
        UsageError: too many tokens are unknown.
    """
    tokens = [token for ids, _ in requests for token in ids]
    share = tokens.count(unknown) / len(tokens)
    if share > MAX_UNKNOWN:
        raise UsageError(f"{what}: {share:.0%} of the tokens are not in the dict.txt of {data}")


class Progress:
    """Prints to stderr how much of a task is done, in tenths."""

    def __init__(self, task: str) -> None:
        self.task, self.tenths = task, 0

    def __call__(self, done: int, of: int) -> None:
        if 10 * done // of > self.tenths:
            self.tenths = 10 * done // of
            print(f"{self.task}: {done / of:.0%}", file=sys.stderr, flush=True)
