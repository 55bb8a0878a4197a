"""The tokenizer that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizer

from ..text import Text

FILE = "sffn_tokenizer.json"


class SFFNTokenizer(PreTrainedTokenizer):
    """Converts text to the token ids of fairseq's dictionary; see :class:`..text.Text`.

    A text begins with the start token, which is ``</s>`` unless the model was trained with
    ``--add-bos-token``.

    Args:
        vocab_file: the settings that ``fairseq-sffn export`` wrote.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.text = Text(json.loads(Path(vocab_file).read_text(encoding="utf-8")))
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.text.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.text.ids)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Return the pieces of a text. Names of special tokens in it are text."""
        return self.text.tokenize(text)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.text.tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.text.id_of(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.text.pieces.get(index, self.text.specials["unk"])

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self.text.join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for each special token, and 0 for the others."""
        ids = [*token_ids_0, *(token_ids_1 or [])]
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(ids)
        special = {self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id}
        return [int(number in special) for number in ids]

    def _decode(
        self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        """Return the text of token ids.

        ``</s>`` is a line break. The start token and the padding before it are left out.
        ``skip_special_tokens`` leaves out all padding and ``<unk>``.
        """
        ids = [token_ids] if isinstance(token_ids, int) else list(map(int, token_ids))
        start = next((i for i, number in enumerate(ids) if number != self.pad_token_id), 0)
        if ids and ids[start] == self.bos_token_id:
            ids = ids[start + 1 :]
        if skip_special_tokens:
            ids = [i for i in ids if i not in (self.pad_token_id, self.unk_token_id)]
        return self.text.join(list(map(self._convert_id_to_token, ids)))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{FILE}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
