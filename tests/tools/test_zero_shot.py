"""``fairseq-sffn zero-shot``: scores against a plain loop, known figures, and the command."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from torch import Tensor

from fairseq_sffn.tools import cli
from fairseq_sffn.tools.likelihood import Encoder, Score, Scorer, batches, windows
from fairseq_sffn.tools.zero_shot_tasks import (
    TASKS,
    Document,
    choice_figures,
    draw,
    read_documents,
    standard_error,
    subset_hash,
    word_figures,
)
from tests import commands
from tests.models.small_lm import TYPES, dictionary, small_lm

POSITIONS = 16
ROUNDING = 1e-5
"""Tolerance, as fairseq's softmax is in single precision."""
EOS, UNK = Dictionary().eos(), Dictionary().unk()


def scorer(model: Any, max_tokens: int = 100, types: int = TYPES, start: int = EOS) -> Scorer:
    return Scorer(model.eval(), dictionary(), start, types, max_tokens, torch.device("cpu"))


# Scores against a plain loop


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


def random_pairs() -> list[tuple[list[int], int]]:
    """Draw short requests, some longer than the positions, and some with continuations longer than
    the positions."""
    sizes = [(1, 1), (5, 2), (15, 3), (16, 3), (17, 3), (16, 16), (40, 16), (25, 17), (45, 40)]
    sizes += [(3, 3), (9, 4), (7, 1)]  # the first has no context
    return [(torch.randint(4, TYPES, (length,)).tolist(), scored) for length, scored in sizes]


MODELS = {
    "dense": {},
    "avgk": {},
    "switch": {},
    "pkm": {},
    "base": {},
    "rand_hash": {},
    "hash_layer": {"hash_table": "bigram"},
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_plain_loop(name: str) -> None:
    model = small_lm(name, **MODELS[name]).eval()
    pairs = random_pairs()
    expected = [plain_score(model, *pair, POSITIONS) for pair in pairs]
    for max_tokens in (1, 40, 10_000):  # one at a time, a few, all
        scores = scorer(model, max_tokens).score(pairs)
        for score, right in zip(scores, expected, strict=True):
            assert score.log_likelihood == pytest.approx(right.log_likelihood, abs=ROUNDING)
            assert score.greedy == right.greedy


def test_scores_do_not_depend_on_the_batch() -> None:
    model, pairs = small_lm("avgk"), random_pairs()
    alone = [scorer(model).score([pair])[0].log_likelihood for pair in pairs]
    for order in (pairs, pairs[::-1]):
        together = [score.log_likelihood for score in scorer(model, 10_000).score(order)]
        assert together[:: 1 if order is pairs else -1] == pytest.approx(alone, abs=ROUNDING)


def test_scores_are_without_dropout() -> None:
    model, pairs = small_lm("avgk", dropout=0.5), random_pairs()
    first, again = (scorer(model).score(pairs) for _ in range(2))
    assert first == again


def test_adaptive_softmax() -> None:
    options = {"adaptive_softmax_cutoff": "8,14", "share_decoder_input_output_embed": False}
    model = small_lm("dense", **options).eval()
    tokens = torch.randint(4, TYPES, (9,)).tolist()
    with torch.no_grad():
        output = model(torch.tensor([[EOS, *tokens[:-1]]]))
        log_probs = model.get_normalized_probs(output, log_probs=True)[0]
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(9, dtype=log_probs.dtype))
    right = log_probs[torch.arange(9), torch.tensor(tokens)][-4:]
    assert scorer(model).score([(tokens, 4)])[0].log_likelihood == pytest.approx(float(right.sum()))


def test_the_token_that_begins_a_text_counts() -> None:
    model, bos = small_lm("dense"), Dictionary().bos()
    first = scorer(model).score([([5, 6], 2)])
    assert first != scorer(model, start=bos).score([([5, 6], 2)])


def test_a_window_is_cut_at_the_left() -> None:
    tokens = list(range(100, 120))
    assert list(windows(tokens, 3, 30)) == [(tokens, 3)]
    assert list(windows(tokens, 3, 19)) == [(tokens, 3)]
    assert list(windows(tokens, 3, 18)) == [(tokens[1:], 3)]
    assert list(windows(tokens, 3, 3)) == [(tokens[-4:], 3)]
    # A continuation longer than the positions is scored in pieces, each after half of the
    # positions.
    assert list(windows(tokens, 9, 8)) == [
        *((tokens[6:15], 4), (tokens[10:19], 4), (tokens[11:20], 1))
    ]
    for length in (16, 17):
        assert scorer(small_lm("dense")).is_cut([5] * length) == (length > POSITIONS)
        assert scorer(small_lm("dense")).is_in_pieces(length) == (length > POSITIONS)


def test_a_cut_context_counts_no_more() -> None:
    model = small_lm("avgk")
    tokens = torch.randint(4, TYPES, (30,)).tolist()
    changed = [4 + (token - 3) % 16 for token in tokens[:13]] + tokens[13:]
    first, second = scorer(model).score([(tokens, 4), (changed, 4)])
    assert first.log_likelihood == pytest.approx(second.log_likelihood, abs=ROUNDING)
    changed[13] = 4 + (changed[13] - 3) % 16
    third = scorer(model).score([(changed, 4)])[0]
    assert abs(third.log_likelihood - first.log_likelihood) > 10 * ROUNDING


def test_batches_are_by_length_and_within_their_tokens() -> None:
    lengths = [3, 9, 1, 9, 4, 30, 2]
    assert list(batches(lengths, 18)) == [[5], [1, 3], [4, 0, 6, 2]]
    assert list(batches(lengths, 1)) == [[5], [1], [3], [4], [0], [6], [2]]
    assert list(batches([], 10)) == []


# The boundary between context and continuation


class Merging:
    """An encoder of letters and of ``ab``, in which a space belongs to the letter after it."""

    def encode(self, text: str) -> str:
        return " ".join(re.findall("_?ab|_?[^_]|_", text.replace(" ", "_")))


@pytest.fixture
def letters() -> Dictionary:
    result = Dictionary()
    for symbol in ("a", "b", "c", "ab", "_a", "_b", "_c", "_ab", "_"):
        result.add_symbol(symbol)
    return result


@pytest.mark.parametrize(
    ("context", "continuation", "tokens", "scored"),
    [
        ("c", " a", "c _a", "_a"),
        ("c ", "a", "c _a", "_a"),  # the space belongs to the letter that it precedes
        ("c  ", "a", "c _ _a", "_ _a"),
        ("c", "ab", "c ab", "ab"),
        ("ca", "bc", "c ab c", "c"),  # merged across the boundary: two tokens belong to the context
        ("ca", "b", "c ab", "ab"),  # all tokens merge, and the last one is scored
        ("", "ab c", "ab _c", "ab _c"),
        ("c", " a ", "c _a _", "_a _"),
        ("c\na", " b", "c </s> a _b", "_b"),  # a line ends with </s>, as in training
        ("c\n", "a", "c </s> a", "</s> a"),  # white space belongs to the text after it
        ("c \n", "a", "c _ </s> a", "_ </s> a"),
        ("c\n ", "a", "c </s> _a", "</s> _a"),
        ("\n", "a", "</s> a", "</s> a"),
        ("c", "\na", "c </s> a", "</s> a"),
        ("c", " x", "c <unk>", "<unk>"),
    ],
)
def test_boundary(
    context: str, continuation: str, tokens: str, scored: str, letters: Dictionary
) -> None:
    ids, count = Encoder(Merging(), letters).encode_pair(context, continuation)
    assert [letters[i] for i in ids] == tokens.split()
    assert [letters[i] for i in ids[-count:]] == scored.split()


def harness_pair(encoder: Encoder, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return all tokens, and the continuation's tokens, by the rule of lm-evaluation-harness."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        context, continuation = context[:-n_spaces], context[-n_spaces:] + continuation
    whole = encoder.encode(context + continuation)
    return whole, whole[len(encoder.encode(context)) :]


SPACES = ("", " ", "  ", "\n", "\n\n", " \n", "\n ", " \n ", "\t", "\r\n", "\u00a0", "\u3000")


@pytest.mark.parametrize("after", ["", " ", "\n"], ids=repr)
@pytest.mark.parametrize("before", SPACES, ids=repr)
@pytest.mark.parametrize("context", ["", "c", "ca", "a b", "a\nb"], ids=repr)
def test_boundary_is_that_of_the_harness(
    context: str, before: str, after: str, letters: Dictionary
) -> None:
    encoder = Encoder(Merging(), letters)
    for continuation in ("a", "ab c", "b"):
        pair = (context + before, after + continuation)
        whole, scored = harness_pair(encoder, *pair)
        ids, count = encoder.encode_pair(*pair)
        assert ids == whole
        assert ids[-count:] == (scored or whole[-1:])  # the harness stops without a token


# Known figures


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


def test_figures_of_a_rigged_model() -> None:
    """The model knows that 6 follows 5. Two of three documents ask for that."""
    model = rigged({5: 6})
    pairs = [([5, 7], 1), ([5, 6], 1), ([5, 6], 1), ([5, 8], 1), ([5, 9], 1), ([5, 6], 1)]
    documents = [
        *(Document(0, (("", " x"), ("", " x")), 1), Document(1, (("", " x"), ("", " x")), 0)),
        Document(2, (("", " x"), ("", " x")), 0),
    ]
    scores = scorer(model).score(pairs)
    figures = choice_figures(documents, [scores[:2], scores[2:4], scores[4:]])
    assert figures.accuracy == figures.accuracy_norm == pytest.approx(2 / 3)
    assert figures.standard_error == pytest.approx(math.sqrt(2 / 9 / 2))
    assert figures.random == 0.5 and figures.perplexity is None


def test_random_baseline_is_the_mean_over_documents() -> None:
    documents = [Document(0, (("", " x"),) * 3, 0), Document(1, (("", " x"),) * 5, 0)]
    scores = [[Score(-1.0, False)] * 3, [Score(-1.0, False)] * 5]
    figures = choice_figures(documents, scores)
    assert figures.random == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert figures.accuracy == 1.0  # the first of equals


def test_accuracy_by_character_differs() -> None:
    """The right choice is less likely as a whole, but more likely per character. The space before
    it does not count."""
    document = Document(0, (("q", " ab"), ("q", " abcd")), 1)
    figures = choice_figures([document], [[Score(-4.0, False), Score(-6.0, False)]])
    assert (figures.accuracy, figures.accuracy_norm) == (0.0, 1.0)
    assert figures.standard_error is None
    # -1 / 1 is less than -1.9 / 2, but with the space -1 / 2 would be more than -1.9 / 3.
    document = Document(0, (("q", " a"), ("q", " ab")), 1)
    assert choice_figures([document], [[Score(-1.0, False), Score(-1.9, False)]]).accuracy_norm


def test_winogrande_is_scored_by_its_contexts() -> None:
    """The same continuation follows each context, so normalised and plain accuracy agree."""
    scores = scorer(rigged({5: 6})).score([([7, 6], 1), ([5, 6], 1)])
    document = Document(0, (("the w1", " w2"), ("the w3", " w2")), 1)
    figures = choice_figures([document], [scores])
    assert figures.accuracy == figures.accuracy_norm == 1.0


def test_lambada_is_right_if_every_token_is_the_most_likely() -> None:
    model = rigged({5: 6, 6: 7})
    scores = scorer(model).score([([5, 6, 7], 2), ([5, 6, 8], 2), ([5, 8, 7], 2), ([5, 6], 1)])
    assert [score.greedy for score in scores] == [True, False, False, True]
    figures = word_figures(scores, types=TYPES)
    assert figures.accuracy == 0.5 and figures.accuracy_norm is None
    assert figures.random == 1 / TYPES
    other = 0.1 / (TYPES - 1)
    product = (0.9 * 0.9) * (0.9 * other) * (other / TYPES) * 0.9
    assert figures.perplexity == pytest.approx(product ** (-1 / 4))
    assert figures.standard_error == pytest.approx(math.sqrt(0.25 / 3))


def test_standard_error_is_that_of_the_mean() -> None:
    right = torch.tensor([1.0] * 7 + [0.0] * 13)
    assert standard_error(7 / 20, 20) == pytest.approx(float(right.std()) / math.sqrt(20))
    assert standard_error(1.0, 1) is None


def test_a_smaller_output_dictionary() -> None:
    """Targets beyond it are <unk>."""
    model = FairseqLanguageModel(Table(torch.randn(TYPES, 12)))
    score, unknown = scorer(model, types=12).score([([5, 15], 1), ([5, UNK], 1)])
    assert score == unknown


# Documents


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


def test_documents_are_drawn_with_all_their_requests(tmp_path: Path) -> None:
    written = [
        {"contexts": [f"{i}"] * (2 + i % 3), "continuations": ["a", "b", "c", "d"][: 2 + i % 3]}
        for i in range(50)
    ]
    write_task(tmp_path, "sciq", [{**document, "label": 1} for document in written])
    documents = read_documents(tmp_path, "sciq")
    drawn = draw(documents, "sciq", 20, seed=1)
    assert len(drawn) == 20 and [d.number for d in drawn] == sorted(d.number for d in drawn)
    for document in drawn:
        i = document.number
        assert document.choices == tuple(
            zip(written[i]["contexts"], written[i]["continuations"], strict=True)
        )


def test_a_draw_is_fixed_by_its_seed() -> None:
    documents = [Document(i, (("", "a"),), 0) for i in range(100)]

    def numbers(task: str = "piqa", count: int = 5, seed: int = 1) -> list[int]:
        return [document.number for document in draw(documents, task, count, seed)]

    # The draw must not change between versions, or figures would be of other documents.
    assert numbers() == [12, 16, 23, 29, 82]
    assert set(numbers()) < set(numbers(count=20))  # a smaller draw is part of a larger one
    assert numbers(seed=2) != numbers() != numbers(task="sciq")
    assert numbers(count=500) == list(range(100))
    other_order = draw(documents[::-1], "piqa", 5, 1)
    assert [document.number for document in other_order] == numbers()
    assert subset_hash(other_order) == subset_hash(draw(documents, "piqa", 5, 1))
    assert subset_hash(other_order) != subset_hash(draw(documents, "piqa", 5, 2))


# The command

WORDS = ("union", "congress", "law", "peace", "war", "tariff", "people", "nation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make requests, an encoder, data and trained models."""
    folder = tmp_path_factory.mktemp("zero_shot")
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
    for name in ("avgk", "hash_layer", "dense"):
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
            "label": i % 2,
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


def zero_shot(folder: Path, model: str, *flags: str) -> None:
    """Run the command on a model of the folder. Later flags win."""
    checkpoint = folder / model / "checkpoint_last.pt"
    cli.main(
        [
            *("zero-shot", str(checkpoint), "--data", str(folder / "bin"), "--cpu"),
            *("--requests", str(folder / "requests"), "--bpe", "sentencepiece"),
            *("--sentencepiece-model", str(folder / "spm.model"), *flags),
        ]
    )


def figures_of(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[str, Any]:
    zero_shot(folder, model, "--json", *flags)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", ["dense", "hash_layer"])
def test_command_against_a_plain_loop(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = figures_of(folder, model, capsys)
    assert [line["task"] for line in report["tasks"]] == list(TASKS)
    assert report["seed"] == 1 and report["checkpoint"].endswith(f"{model}/checkpoint_last.pt")

    from fairseq import checkpoint_utils

    path = str(folder / model / "checkpoint_last.pt")
    loaded = checkpoint_utils.load_model_ensemble_and_task(
        [path], arg_overrides={"data": str(folder / "bin")}
    )
    lm, symbols = loaded[0][0].eval(), loaded[2].source_dictionary
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spm.model"))

    def ids(text: str) -> list[int]:
        return [symbols.index(piece) for piece in pieces.encode(text, out_type=str)]

    right = right_norm = 0
    for i in range(12):
        question = ids(f"Question: the {WORDS[i % 8]} of" + " the law of" * i)
        answer = ids("Answer:")
        scores = []
        for k in range(4):
            choice = f"{WORDS[(i + k) % 8]}" + " of the" * k
            tail = ids(f"Answer: {choice}")[len(answer) :]
            tokens = [*question, EOS, *answer, *tail]
            score = plain_score(lm, tokens, len(tail), POSITIONS).log_likelihood
            scores.append((score, score / len(choice)))
        right += max(range(4), key=lambda k: scores[k][0]) == i % 4
        right_norm += max(range(4), key=lambda k: scores[k][1]) == i % 4
    piqa, lambada = report["tasks"][1], report["tasks"][-1]
    assert piqa["accuracy"] == right / 12 and piqa["accuracy_norm"] == right_norm / 12
    assert piqa["documents"] == piqa["documents_of_task"] == 12 and piqa["random"] == 0.25
    assert 0 < piqa["cut_requests"] < piqa["requests"] == 48 and len(piqa["subset"]) == 16

    words = []
    for word in WORDS:
        context = ids("the law of the")
        tail = ids(f"the law of the {word}")[len(context) :]
        words.append(plain_score(lm, [*context, *tail], len(tail), POSITIONS))
    mean = sum(word.log_likelihood for word in words) / 8
    assert lambada["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert lambada["accuracy"] == sum(word.greedy for word in words) / 8
    assert lambada["accuracy_norm"] is None


def test_requests_longer_than_the_context_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " of the law" * 8
    choices = [
        {"contexts": ["the law"] * 2, "continuations": [" is", end], "label": 0}
        for end in (" a", long)
    ]
    choices.append({"contexts": ["the law" + long] * 2, "continuations": [" is", long], "label": 0})
    write_task(tmp_path, "piqa", choices)
    write_task(tmp_path, "sciq", [{**choices[2], "continuations": [" is", " a"]}])
    write_task(tmp_path, "openbookqa", choices[:1])
    flags = ("--requests", str(tmp_path), "--tasks", "piqa,sciq,openbookqa")
    names = ("requests", "cut_requests", "requests_in_pieces")
    report = figures_of(folder, "avgk", capsys, *flags)
    counts = [[task[name] for name in names] for task in report["tasks"]]
    assert counts == [[6, 3, 2], [2, 2, 0], [2, 0, 0]]
    zero_shot(folder, "avgk", *flags)
    cut = "requests are longer than the model's context and cut at the left"
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "",
        f"piqa: 3 of 6 {cut}; 2 have a continuation that is longer by itself and is scored in "
        "pieces, where lm-evaluation-harness stops",
        f"sciq: 2 of 2 {cut}",
    ]


def test_table_and_progress(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero_shot(folder, "avgk", "--tasks", "lambada,winogrande", "--documents", "5")
    printed = capsys.readouterr()
    lines = [re.split(r"  +", line.strip()) for line in printed.out.splitlines()]
    assert lines[0][0].endswith("checkpoint_last.pt: zero-shot, seed 1")
    assert lines[2] == ["documents", "accuracy", "by character", "random", "perplexity"]
    assert [line[0] for line in lines[3:]] == ["lambada", "winogrande"]
    assert lines[3][1] == "5 of 8" and lines[4][1] == "5 of 6" and lines[4][4] == "50.0%"
    assert max(map(len, printed.out.splitlines()[2:])) <= 80
    assert printed.err.splitlines()[-1] == "winogrande: 100%"


def test_figures_do_not_depend_on_batches_or_other_tasks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = figures_of(folder, "avgk", capsys, "--tasks", "lambada,piqa")["tasks"]
    for max_tokens in ("1", "100000"):
        alone = figures_of(folder, "avgk", capsys, "--tasks", "piqa", "--max-tokens", max_tokens)
        assert alone["tasks"] == both[1:]
    few = ("--tasks", "piqa", "--documents", "4")
    first = figures_of(folder, "avgk", capsys, *few)
    assert first == figures_of(folder, "avgk", capsys, *few)
    assert first["tasks"][0]["documents"] == 4
    other = figures_of(folder, "avgk", capsys, *few, "--seed", "2")
    assert other["tasks"][0]["subset"] != first["tasks"][0]["subset"]
    assert figures_of(folder, "avgk", capsys, *few, "--full")["tasks"] == both[1:]


def test_a_checkpoint_in_parts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = figures_of(folder, "avgk", capsys)
    parts = tmp_path / "avgk" / "checkpoint_last.pt"
    parts.parent.mkdir()
    checkpoint = folder / "avgk" / "checkpoint_last.pt"
    cli.main(["reshard", str(checkpoint), str(parts), "--shards", "2"])
    capsys.readouterr()
    for name in ("bin", "requests", "spm.model"):
        (tmp_path / name).symlink_to(folder / name)
    assert figures_of(tmp_path, "avgk", capsys)["tasks"] == whole["tasks"]


def test_other_encoders_of_fairseq(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's encoder has numbers as tokens: here 256 bytes, and no merges."""
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    codes = {character: byte for byte, character in bytes_to_unicode().items()}
    (tmp_path / "encoder.json").write_text(json.dumps(codes))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n\n")
    files = ("--gpt2-encoder-json", str(tmp_path / "encoder.json"))
    files += ("--gpt2-vocab-bpe", str(tmp_path / "vocab.bpe"))
    text = "\n".join(" ".join(map(str, f"the {word} .".encode())) for word in 20 * WORDS) + "\n"
    (tmp_path / "train").write_text(text)
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", tmp_path / "bin"),
        *("--trainpref", tmp_path / "train", "--validpref", tmp_path / "train"),
    )
    commands.train(tmp_path / "bin", tmp_path / "dense", "dense", "--max-update", "1")
    checkpoint = str(tmp_path / "dense" / "checkpoint_last.pt")
    flags = ["--requests", str(folder / "requests"), "--cpu", "--bpe", "gpt2", "--json"]
    flags += ["--tasks", "lambada", "--data", str(tmp_path / "bin")]
    cli.main(["zero-shot", checkpoint, *flags, *files])
    assert json.loads(capsys.readouterr().out)["tasks"][0]["documents"] == 8
    # A model that was trained on other pieces knows none of its tokens.
    line = refusal(
        folder, "dense", capsys, *("--bpe", "gpt2", *files, "--tasks", "lambada"), encoder=False
    )
    assert line.startswith("--bpe gpt2: lambada: 100% of the tokens are not in the dict.txt of ")


# Refused input


def refusal(
    folder: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
    *flags: str,
    encoder: bool = True,
) -> str:
    """Return the one line that the command ends with, before it scores anything."""
    own = ("--bpe", "sentencepiece", "--sentencepiece-model", str(folder / "spm.model"))
    checkpoint = folder / model / "checkpoint_last.pt"
    arguments = ["zero-shot", str(checkpoint), "--data", str(folder / "bin"), "--cpu"]
    arguments += ["--requests", str(folder / "requests"), *(own if encoder else ())]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, *flags])
    line = stopped.value.code
    assert isinstance(line, str) and "\n" not in line
    assert capsys.readouterr() == ("", "")
    return line


REFUSED = [
    ("--documents 0", "must be at least 1"),
    ("--documents -3", "must be at least 1"),
    ("--max-tokens 0", "must be at least 1"),
    ("--tasks piqa,nonsense", "'nonsense' is none of hellaswag, piqa"),
    ("--requests nowhere", "there is no such folder"),
    ("--sentencepiece-model nowhere", "there is no such file"),
    ("--data nowhere", "has no dict.txt"),
    ("--model-overrides [1]", "is no dictionary"),
    ("--model-overrides {", "is no dictionary"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_wrong_input_is_refused_in_one_line(
    flags: str, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(folder, "avgk", capsys, *flags.split())
    assert line.startswith(f"{flags}: ") and reason in line


def test_wrong_files_are_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = folder / "nowhere" / "checkpoint_last.pt"
    line = refusal(folder, "nowhere", capsys)
    assert line == f"checkpoint {missing}: there is no such file"

    (tmp_path / "requests").mkdir()
    line = refusal(folder, "avgk", capsys, "--requests", str(tmp_path / "requests"))
    assert line == f"--requests {tmp_path / 'requests'}: has no hellaswag.jsonl"

    (tmp_path / "bad.model").write_text("no model")
    flags = ("--sentencepiece-model", str(tmp_path / "bad.model"))
    line = refusal(folder, "avgk", capsys, *flags)
    assert line.startswith("--bpe sentencepiece --sentencepiece-model ")

    line = refusal(folder, "avgk", capsys, "--bpe", "sentencepiece", encoder=False)
    assert line == "--sentencepiece-model: is required by --bpe sentencepiece"

    words = (folder / "bin" / "dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join(words[:-8]) + "\n")
    line = refusal(folder, "avgk", capsys, "--data", str(tmp_path))
    expected = f"makes {len(words) - 4} types, the model has {len(words) + 4}"
    assert line.startswith(f"--data {tmp_path}: ") and line.endswith(expected)


GOOD = {"request": {"context": "a", "continuation": " b"}, "doc_id": 0, "idx": 0, "label": 0}
BAD_LINES = [
    ("{", "line 2 is no request"),
    ("[]", "line 2 is no request"),
    (json.dumps({**GOOD, "request": {"context": "a"}}), "line 2 is no request"),
    (json.dumps({**GOOD, "idx": 1, "request": {"context": "a", "continuation": " "}}), "line 2"),
    (json.dumps({**GOOD, "idx": 1, "request": {"context": None, "continuation": "b"}}), "line 2"),
    (json.dumps({**GOOD, "idx": 1, "label": 1}), "line 2 is no request"),
    (json.dumps({**GOOD, "idx": 1, "label": ["b"]}), "line 2 is no request"),
    (json.dumps(GOOD), "line 2 is no request"),  # the same choice again
    (json.dumps({**GOOD, "idx": 2}), "document 0 lacks requests"),
    (json.dumps({**GOOD, "doc_id": 1, "label": 1}), "document 1 lacks requests"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_damaged_requests_are_refused_in_one_line(
    line: str, reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "piqa.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    said = refusal(folder, "avgk", capsys, "--requests", str(tmp_path), "--tasks", "piqa")
    assert said.startswith(f"--requests {tmp_path}: piqa.jsonl, ") and reason in said
    (tmp_path / "piqa.jsonl").write_text("")
    said = refusal(folder, "avgk", capsys, "--requests", str(tmp_path), "--tasks", "piqa")
    assert said == f"--requests {tmp_path}: piqa.jsonl is empty"


def test_a_model_of_another_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model-overrides", "{'decoder_layers': 3}")
    for model in ("avgk", "dense"):
        assert "decoder.layers.2." in refusal(folder, model, capsys, *flags)


def test_a_model_whose_texts_begin_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --add-bos-token, texts begin with <s>."""
    flags = ("--tasks", "lambada")
    report = figures_of(folder, "avgk", capsys, *flags)
    bos = figures_of(folder, "avgk", capsys, *flags, "--model-overrides", "{'add_bos_token': True}")
    assert bos["tasks"][0]["perplexity"] != report["tasks"][0]["perplexity"]


def changed_checkpoint(folder: Path, target: Path, **options: Any) -> None:
    """Copy the folder with another ``avgk``, whose model has other options."""
    state = torch.load(folder / "avgk" / "checkpoint_last.pt", weights_only=True)
    state["cfg"]["model"].update(options)
    (target / "avgk").mkdir()
    torch.save(state, target / "avgk" / "checkpoint_last.pt")
    for name in ("bin", "requests", "spm.model"):
        (target / name).symlink_to(folder / name)


def test_a_capacity_lets_documents_compete(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_checkpoint(folder, tmp_path, sffn_eval_capacity_factor=1.0)
    line = refusal(tmp_path, "avgk", capsys)
    assert "--sffn-eval-capacity-factor 1.0 lets documents compete" in line
    overrides = ("--model-overrides", "{'sffn_eval_capacity_factor': 0}")
    assert overrides[1] in line
    without = figures_of(tmp_path, "avgk", capsys, *overrides)
    assert without["tasks"] == figures_of(folder, "avgk", capsys)["tasks"]


def test_no_language_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_checkpoint(folder, tmp_path, _name="transformer", max_target_positions=64)
    assert refusal(tmp_path, "avgk", capsys).endswith("holds no language model, but a transformer")


def test_a_model_that_predicts_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(folder / "avgk" / "checkpoint_last.pt", weights_only=True)
    changed_checkpoint(folder, tmp_path)
    state["model"]["decoder.layer_norm.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "avgk" / "checkpoint_last.pt")
    with pytest.raises(SystemExit, match="predicts what is not a number"):
        zero_shot(tmp_path, "avgk")


@pytest.mark.parametrize("flags", [["--nonsense", "3"], ["--sentencepiece", "x"]])
def test_unknown_flags_are_usage_errors(
    flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        zero_shot(folder, "avgk", *flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err
