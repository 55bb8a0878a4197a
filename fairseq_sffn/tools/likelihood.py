"""Log-likelihood of a continuation, given its context, under a language model of fairseq."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens
from fairseq.models import FairseqLanguageModel
from torch import Tensor


class Encoder:
    """Text to token ids, as a model was trained on them: a line break is ``</s>``, which
    ``fairseq-preprocess`` puts at the end of each line.

    Args:
        bpe: one of fairseq's encoders.
        dictionary: of the model.
    """

    def __init__(self, bpe: Any, dictionary: Dictionary) -> None:
        self.bpe, self.dictionary = bpe, dictionary

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without ``</s>`` at its beginning or end."""
        ids: list[int] = []
        for i, line in enumerate(text.split("\n")):
            if i > 0:
                ids.append(self.dictionary.eos())
            pieces = self.dictionary.encode_line(
                self.bpe.encode(line), append_eos=False, add_if_not_exist=False
            )
            ids += pieces.tolist()
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The token ids of context and continuation together, and how many of them, at the end, are
        the continuation's.

        The two together may be other tokens than each by itself. The continuation has those beyond
        as many as the context has by itself, and at least one. White space at the end of the
        context, line breaks included, is the continuation's, since an encoder that marks the
        beginnings of words has it there. lm-evaluation-harness splits in the same way
        (``_encode_pair``), but stops where the continuation has no token of its own.
        """
        whole = self.encode(context + continuation)
        return whole, max(len(whole) - len(self.encode(context.rstrip())), 1)


class Window(NamedTuple):
    """What is scored in one go: ``scored`` tokens at the end of ``tokens``, the others before them
    being their context."""

    tokens: list[int]
    scored: int


def windows(tokens: list[int], scored: int, positions: int) -> Iterator[Window]:
    """A sequence as the model takes it: cut at the left to ``positions``, which the last token does
    not count in, as it is only predicted.

    A continuation that is longer is scored in pieces of half of the positions, so that each token
    has at least that much context. lm-evaluation-harness stops at such a continuation.
    """
    piece = scored if scored <= positions else max(positions // 2, 1)
    for begin in range(len(tokens) - scored, len(tokens), piece):
        end = min(begin + piece, len(tokens))
        yield Window(tokens[max(end - positions - 1, 0) : end], end - begin)


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of windows, longest first, in batches of at most ``max_tokens`` with padding, or of
    one window that is longer."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Score(NamedTuple):
    """Of a continuation: its log-likelihood in nats, and whether each of its tokens is the most
    likely one."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Scorer:
    """Scores continuations.

    Attributes:
        model: in evaluation mode.
        dictionary: its own.
        start: the token that begins a text.
        types: that the model predicts; targets beyond them are ``<unk>``, as in training.
        max_tokens: of a batch, padding included.
        device: that the model is on.
    """

    model: FairseqLanguageModel
    dictionary: Dictionary
    start: int
    types: int
    max_tokens: int
    device: torch.device

    @property
    def positions(self) -> int:
        """The context of the model, in tokens."""
        return int(self.model.max_positions())

    def is_cut(self, tokens: list[int]) -> bool:
        """Whether a sequence, as :meth:`Encoder.encode_pair` gives it, has more tokens than the
        model takes."""
        return len(tokens) > self.positions

    def is_in_pieces(self, scored: int) -> bool:
        """Whether a continuation has more tokens than the model takes, and is scored in pieces."""
        return scored > self.positions

    def score(
        self,
        pairs: Sequence[tuple[list[int], int]],
        progress: Callable[[int, int], None] = lambda done, all: None,
    ) -> list[Score]:
        """Scores of sequences, which do not depend, beyond rounding, on what they are batched with.

        Args:
            pairs: as :meth:`Encoder.encode_pair` gives them.
            progress: is told how many of how many windows are done.
        """
        cut = [
            (i, window)
            for i, (tokens, scored) in enumerate(pairs)
            for window in windows([self.start, *tokens], scored, self.positions)
        ]
        totals, greedy, done = [0.0] * len(pairs), [True] * len(pairs), 0
        for batch in batches([len(window.tokens) - 1 for _, window in cut], self.max_tokens):
            scores = self._score_batch([cut[i][1] for i in batch])
            for (pair, _), score in zip([cut[i] for i in batch], scores, strict=True):
                totals[pair] += score.log_likelihood
                greedy[pair] &= score.greedy
            done += len(batch)
            progress(done, len(cut))
        return [Score(*score) for score in zip(totals, greedy, strict=True)]

    @torch.no_grad()
    def _score_batch(self, batch: list[Window]) -> list[Score]:
        inputs = [torch.tensor(window.tokens[:-1]) for window in batch]
        lengths = torch.tensor([len(row) for row in inputs])
        scored = torch.tensor([window.scored for window in batch])
        tokens_BT = collate_tokens(inputs, self.dictionary.pad()).to(self.device)
        position_T = torch.arange(tokens_BT.shape[1])
        is_scored_BT = (position_T < lengths[:, None]) & (position_T >= (lengths - scored)[:, None])
        targets_N = torch.tensor([token for w in batch for token in w.tokens[-w.scored :]])
        targets_N[targets_N >= self.types] = self.dictionary.unk()
        targets_N = targets_N.to(self.device)

        output, *rest = self.model(tokens_BT, src_lengths=lengths.to(self.device))
        # Softmax of what is scored alone: contexts are most of the tokens.
        output_1NV = output[is_scored_BT.to(self.device)].unsqueeze(0)
        normalized = self.model.get_normalized_probs((output_1NV, *rest), log_probs=True)
        log_probs_NV: Tensor = normalized.squeeze(0)
        log_probs_N = log_probs_NV.gather(1, targets_N[:, None]).squeeze(1).double().cpu()
        greedy_N = (log_probs_NV.argmax(1) == targets_N).cpu()
        counts = scored.tolist()
        return [
            Score(float(part.sum()), bool(hits.all()))
            for part, hits in zip(log_probs_N.split(counts), greedy_N.split(counts), strict=True)
        ]
