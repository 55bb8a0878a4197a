"""Log-likelihood of a continuation, given its context, under a fairseq language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from fairseq.models import FairseqLanguageModel
from torch import Tensor


class Encoder:
    """Converts text to the token ids that a model was trained on.

    A line break is ``</s>``, which ``fairseq-preprocess`` puts at the end of each line.

    Args:
        bpe: one of fairseq's encoders.
        dictionary: the model's dictionary.
    """

    def __init__(self, bpe: Any, dictionary: Dictionary) -> None:
        self.bpe, self.dictionary = bpe, dictionary

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without ``</s>`` at its beginning or end."""
        ids: list[int] = []
        for i, line in enumerate(text.split("\n")):
            if i > 0:
                ids.append(self.dictionary.eos())
            pieces = self.dictionary.encode_line(
                self.bpe.encode(line), append_eos=False, add_if_not_exist=False
            )
            ids += pieces.tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. ``</s>`` is a line break.

        SentencePiece decodes its pieces itself: fairseq's ``decode`` leaves the pieces of bytes,
        such as ``<0x0A>``, and strips spaces.

        Args:
            ids: token ids. Unknown words and ``<pad>`` have no text.

        Raises:
            ValueError: a token is none of the encoder's.
        """
        lines: list[list[str]] = [[]]
        for token in ids:
            if token == self.dictionary.eos():
                lines.append([])
            else:
                lines[-1].append(self.dictionary[token])
        return "\n".join(map(self._decode_line, lines))

    def _decode_line(self, pieces: list[str]) -> str:
        if isinstance(self.bpe, SentencepieceBPE):
            return str(self.bpe.sp.decode_pieces(pieces))
        return str(self.bpe.decode(" ".join(pieces)))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the token ids of context and continuation together.

        The joined text may have other tokens than its two pieces. If the context alone has n
        tokens, the continuation has all tokens after the first n, and at least one. White space and
        line breaks at the end of the context belong to the continuation, because encoders mark the
        beginnings of words. lm-evaluation-harness splits in the same way (``_encode_pair``), but
        stops if the continuation has no token.

        Returns:
            The token ids, and the number of ids at the end that belong to the continuation.
        """
        whole = self.encode(context + continuation)
        return whole, max(len(whole) - len(self.encode(context.rstrip())), 1)


class Window(NamedTuple):
    """Tokens that the model reads at once.

    Attributes:
        tokens: token ids.
        scored: number of tokens at the end that are scored. The others are their context.
    """

    tokens: list[int]
    scored: int


def windows(tokens: list[int], scored: int, positions: int) -> Iterator[Window]:
    """Yield windows that fit the model and together score a continuation.

    A window has at most ``positions + 1`` tokens, because its last token is only predicted. Longer
    contexts are cut at the left. A continuation of more than ``positions`` tokens is scored in
    pieces of half of the positions, so that each token has at least that much context.
    lm-evaluation-harness stops at such a continuation.

    Args:
        tokens: token ids of the start token, the context and the continuation.
        scored: number of tokens of the continuation.
        positions: the model's positions.
    """
    piece = scored if scored <= positions else max(positions // 2, 1)
    for begin in range(len(tokens) - scored, len(tokens), piece):
        end = min(begin + piece, len(tokens))
        yield Window(tokens[max(end - positions - 1, 0) : end], end - begin)


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices of windows, longest windows first.

    A batch has at most ``max_tokens`` tokens with padding. A longer window is a batch by itself.

    Args:
        lengths: tokens of each window.
        max_tokens: tokens of a batch, padding included.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Score(NamedTuple):
    """Score of a continuation.

    Attributes:
        log_likelihood: log-likelihood in nats.
        greedy: whether each token of the continuation is the most likely one.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Scorer:
    """Scores continuations.

    Attributes:
        model: the model, in evaluation mode.
        dictionary: the model's dictionary.
        start: id of the token that begins a text.
        types: number of types that the model predicts. Other targets are ``<unk>``, as in training.
        max_tokens: tokens of a batch, padding included.
        device: the model's device.
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
        """Return whether a sequence of :meth:`Encoder.encode_pair` has more tokens than the model
        has positions."""
        return len(tokens) > self.positions

    def is_in_pieces(self, scored: int) -> bool:
        """Return whether a continuation of ``scored`` tokens is longer than the model's positions.

        It is then scored in pieces.
        """
        return scored > self.positions

    def score(
        self,
        requests: Sequence[tuple[list[int], int]],
        progress: Callable[[int, int], None] = lambda done, all: None,
    ) -> list[Score]:
        """Return the score of each request, whose text begins with :attr:`start`.

        A score depends on the other requests of its batch only by rounding.

        Args:
            requests: results of :meth:`Encoder.encode_pair`.
            progress: called after each batch with the numbers of finished and of all windows.
        """
        started = [([self.start, *tokens], scored) for tokens, scored in requests]
        return self.score_sequences(started, progress)

    def score_sequences(
        self,
        requests: Sequence[tuple[list[int], int]],
        progress: Callable[[int, int], None] = lambda done, all: None,
    ) -> list[Score]:
        """Return the scores as :meth:`score`, of sequences that begin with any token.

        Args:
            requests: token ids, and the number of ids at the end that are scored. The first id is
                only context.
            progress: called after each batch with the numbers of finished and of all windows.
        """
        cut = [
            (i, window)
            for i, (tokens, scored) in enumerate(requests)
            for window in windows(tokens, scored, self.positions)
        ]
        totals, greedy, done = [0.0] * len(requests), [True] * len(requests), 0
        for batch in batches([len(window.tokens) - 1 for _, window in cut], self.max_tokens):
            scores = self._score_batch([cut[i][1] for i in batch])
            for (request, _), score in zip([cut[i] for i in batch], scores, strict=True):
                totals[request] += score.log_likelihood
                greedy[request] &= score.greedy
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
        # Softmax of the scored positions only: most tokens are context.
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
