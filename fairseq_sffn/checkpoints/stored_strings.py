"""Rules for the strings in the configuration of a checkpoint.

fairseq evaluates some of the strings as Python, and uses others as paths or names.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

TOKENIZERS = ("space", "moses", "nltk")


def is_word(value: str) -> bool:
    """Return whether a string consists of names only.

    No function of fairseq evaluates such a string, and it does not lead out of a folder.
    """
    return re.fullmatch(r"[\w@.,+: -]{0,200}", value) is not None and ".." not in value


def is_literal(value: str, accepts: Callable[[Any], bool]) -> bool:
    """Return whether a string is a Python literal of the expected shape."""
    try:
        return len(value) < 10_000 and accepts(ast.literal_eval(value))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return False


def is_number(value: Any) -> bool:
    """Return whether a value is an ``int`` or a ``float``, but not a ``bool``."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_filters(value: str) -> bool:
    """Return whether a string is a list of pairs of integers, as in ``--character-filters``."""

    def are_pairs(pairs: Any) -> bool:
        return isinstance(pairs, list) and all(
            isinstance(pair, tuple) and len(pair) == 2 and all(type(size) is int for size in pair)
            for pair in pairs
        )

    return is_literal(value, are_pairs)


def is_numbers(value: str) -> bool:
    """Return whether a string holds numbers only.

    Examples are ``--adaptive-softmax-cutoff 1000,5000`` and ``--adam-betas "(0.9, 0.98)"``.
    """

    def are_numbers(numbers: Any) -> bool:
        return is_number(numbers) or (
            isinstance(numbers, list | tuple) and all(map(is_number, numbers))
        )

    return value == "" or is_literal(value, are_numbers)


def is_plan(value: str) -> bool:
    """Return whether a string has the form of a layer plan.

    An example is ``--sffn-layers hash_layer:0-2,avgk/block_size=64:3-``.
    """
    entry = r" *\w+(/\w+=[\w.-]+)*:\d+(-\d*)? *"
    return len(value) < 10_000 and all(
        re.fullmatch(entry, part, re.ASCII) for part in value.split(",")
    )


def is_settings(value: str) -> bool:
    """Return whether a string is a JSON object of numbers, booleans and words.

    An example is the value of ``--eval-bleu-args``.
    """
    try:
        settings = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and all(
        name.isidentifier()
        and (item is None or isinstance(item, int | float) or (type(item) is str and is_word(item)))
        for name, item in settings.items()
    )


STRINGS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(
        (
            *("source_lang", "target_lang", "train_subset", "valid_subset", "gen_subset"),
            *("shorten_data_split_list", "eval_bleu_remove_bpe", "bpe_separator", "post_process"),
            *("best_checkpoint_metric", "distributed_backend", "slowmo_base_algorithm"),
        ),
        is_word,
    ),
    "eval_bleu_detok": lambda value: value in TOKENIZERS,
    "eval_bleu_args": is_settings,
    "eval_bleu_detok_args": is_settings,
    "character_filters": is_filters,
    "adaptive_softmax_cutoff": is_numbers,
    "adaptive_input_cutoff": is_numbers,
    "adam_betas": is_numbers,
    "encoder_layers_to_keep": is_numbers,
    "decoder_layers_to_keep": is_numbers,
    "sffn_layers": is_plan,
}
"""Option that takes a string -> rule for its stored value."""


def is_nothing(value: str) -> bool:
    """Return whether a string is empty. This is the rule for options without an entry above."""
    return value == ""
