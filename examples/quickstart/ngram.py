"""Computes the perplexity of a unigram and a bigram model, as baselines for a language model.

The models score exactly the tokens that `fairseq-eval-lm` scores for --task language_modeling with
--sample-break-mode none. A split is one stream, and each of its tokens is a target, including the
</s> at each end of line. The first token is predicted from </s>. Perplexity is per token.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fairseq.data import Dictionary, data_utils

DISCOUNTS = np.arange(1, 100) / 100


def read_tokens(data: Path, split: str, dictionary: Dictionary) -> np.ndarray:
    """Return the token ids of a binarised split, one line after the other: (tokens,) int64."""
    dataset = data_utils.load_indexed_dataset(str(data / split), dictionary)
    if dataset is None:
        sys.exit(f"--data {data}: no split `{split}` there; fairseq-preprocess makes it")
    return np.concatenate([dataset[i].numpy() for i in range(len(dataset))]).astype(np.int64)


def contexts(tokens: np.ndarray, eos: int) -> np.ndarray:
    """Return the token before each token. Before the first token it is `eos`."""
    return np.concatenate([[eos], tokens[:-1]])


def unigram_probs(train: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return add-one-smoothed probabilities of all tokens: (vocab_size,)."""
    counts = np.bincount(train, minlength=vocab_size)
    return (counts + 1) / (len(train) + vocab_size)


@dataclass(frozen=True)
class BigramTerms:
    """The terms of the bigram probability of each target, without the discount: (targets,)."""

    pair_count: np.ndarray  # how often train has the context before the target
    context_count: np.ndarray  # how often train has the context
    followers: np.ndarray  # how many different tokens follow the context
    unigram: np.ndarray  # unigram probability of the target

    def probs(self, discount: float) -> np.ndarray:
        """Compute interpolated absolute discounting (Ney, Essen and Kneser 1994).

        Each seen bigram loses `discount` of its count, and the unigram model distributes the
        discounted probability. An unseen context has the unigram probabilities.
        """
        kept = np.maximum(self.pair_count - discount, 0)
        given_up = discount * self.followers
        seen = np.maximum(self.context_count, 1)
        bigram = (kept + given_up * self.unigram) / seen
        return np.where(self.context_count > 0, bigram, self.unigram)


def bigram_terms(train: np.ndarray, targets: np.ndarray, vocab_size: int, eos: int) -> BigramTerms:
    """Look up the counts of `train` for every token of `targets`."""
    train_contexts = contexts(train, eos)
    pairs, pair_counts = np.unique(train_contexts * vocab_size + train, return_counts=True)
    context_counts = np.bincount(train_contexts, minlength=vocab_size)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)

    target_contexts = contexts(targets, eos)
    wanted = target_contexts * vocab_size + targets
    index = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    return BigramTerms(
        pair_count=np.where(pairs[index] == wanted, pair_counts[index], 0),
        context_count=context_counts[target_contexts],
        followers=followers[target_contexts],
        unigram=unigram_probs(train, vocab_size)[targets],
    )


def perplexity(probs: np.ndarray) -> float:
    """Return exp of the mean negative log probability of the targets."""
    return float(np.exp(-np.log(probs).mean()))


def ngram_rows(data: Path) -> list[dict[str, str | float]]:
    """Fit both models on train, choose the bigram's discount on valid, and score valid and test.

    Returns:
        A row {"arch", "valid_ppl", "test_ppl"} for "unigram" and one for "bigram".
    """
    dict_path = data / "dict.txt"
    if not dict_path.is_file():
        sys.exit(f"--data {data}: no dict.txt there; fairseq-preprocess makes it")
    dictionary = Dictionary.load(str(dict_path))
    vocab_size, eos = len(dictionary), dictionary.eos()
    train, valid, test = (read_tokens(data, s, dictionary) for s in ("train", "valid", "test"))

    unigram = unigram_probs(train, vocab_size)
    valid_terms = bigram_terms(train, valid, vocab_size, eos)
    test_terms = bigram_terms(train, test, vocab_size, eos)
    discount = min(DISCOUNTS, key=lambda d: perplexity(valid_terms.probs(d)))
    return [
        {
            "arch": "unigram",
            "valid_ppl": perplexity(unigram[valid]),
            "test_ppl": perplexity(unigram[test]),
        },
        {
            "arch": "bigram",
            "valid_ppl": perplexity(valid_terms.probs(discount)),
            "test_ppl": perplexity(test_terms.probs(discount)),
        },
    ]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: it is either complete or missing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="output of fairseq-preprocess")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        sys.exit(f"--output {args.output}: its directory does not exist")

    rows = ngram_rows(args.data)
    write_atomically(args.output, json.dumps(rows, indent=2).encode() + b"\n")
    for row in rows:
        print(f"{row['arch']:<8} valid {row['valid_ppl']:8.2f}  test {row['test_ppl']:8.2f}")


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    main()
