"""Scores against a plain loop, and the boundary between context and continuation."""

from __future__ import annotations

import re

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqLanguageModel

from fairseq_sffn.tools.likelihood import Encoder, batches, windows
from tests.models.small_lm import TYPES, small_lm
from tests.tools.scoring import EOS, POSITIONS, ROUNDING, UNK, Table, plain_score, scorer

# Scores against a plain loop


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


def test_a_smaller_output_dictionary() -> None:
    """Targets beyond it are <unk>."""
    model = FairseqLanguageModel(Table(torch.randn(TYPES, 12)))
    score, unknown = scorer(model, types=12).score([([5, 15], 1), ([5, UNK], 1)])
    assert score == unknown


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
