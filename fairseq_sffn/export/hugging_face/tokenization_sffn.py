"""The tokenizer that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizer, TextGenerationPipeline
from transformers.pipelines.text_generation import ReturnType

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

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], **kwargs: Any) -> int:
        """Name special tokens, which must be those of the dictionary."""
        for value in special_tokens_dict.values():
            self._check_special(value if isinstance(value, (list, tuple)) else [value])
        return int(super().add_special_tokens(special_tokens_dict, **kwargs))

    def _add_tokens(self, new_tokens: Sequence[Any], special_tokens: bool = False) -> int:
        self._check_special(new_tokens)
        return int(super()._add_tokens(new_tokens, special_tokens))

    def _check_special(self, tokens: Sequence[Any]) -> None:
        for token in map(str, tokens):
            if token not in self.text.specials.values():
                raise ValueError(
                    f"{token!r} cannot be added: the model has a row for each token id of dict.txt"
                )

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Return the pieces of a text. Names of special tokens in it are text.

        Raises:
            NotImplementedError: ``return_offsets_mapping`` is asked for.
        """
        if kwargs.get("return_offsets_mapping"):
            raise NotImplementedError(
                "return_offsets_mapping: pieces of normalized text have no place in the text"
            )
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

        Without the start token, the ids continue a line, so that the first space stays. ``</s>``
        behind the start token is a line break. ``skip_special_tokens`` leaves out the start token,
        padding and ``<unk>``.
        """
        ids = [token_ids] if isinstance(token_ids, int) else list(map(int, token_ids))
        first = next((i for i, number in enumerate(ids) if number != self.pad_token_id), len(ids))
        begins = ids[first : first + 1] == [self.bos_token_id]
        start, rest = ids[: first + begins], ids[first + begins :]
        if skip_special_tokens:
            skipped = (self.pad_token_id, self.unk_token_id)
            start, rest = [], [number for number in rest if number not in skipped]
        names = "".join(map(self._convert_id_to_token, start))
        return names + self.text.join(list(map(self._convert_id_to_token, rest)), not begins)

    def decode_after(self, before: Sequence[int], after: Sequence[int], **kwargs: Any) -> str:
        """Return the text that token ids add to that of the ids before them.

        Alone, they have another text at the beginning of a line, and within a character.

        Args:
            before: begin with the start token.
            after: the ids behind them.
            kwargs: see :meth:`decode`.
        """
        start = str(self.decode(before, **kwargs))
        whole = str(self.decode([*before, *after], **kwargs))
        if whole.startswith(start):
            return whole.removeprefix(start)
        return str(self.decode(after, **kwargs))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{FILE}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class SFFNTextGenerationPipeline(TextGenerationPipeline):
    """transformers' pipeline, which decodes new tokens with the prompt before them."""

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_type: ReturnType = ReturnType.FULL_TEXT,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = super().postprocess(model_outputs, return_type, **kwargs)
        if return_type == ReturnType.TENSORS:
            return records
        skip = kwargs.get("skip_special_tokens")
        begin = model_outputs["prompt_text"] if return_type == ReturnType.FULL_TEXT else ""
        ids = model_outputs["input_ids"]
        prompt = [] if ids is None else ids[0].tolist()
        sequences = model_outputs["generated_sequence"][0].tolist()
        for record, sequence in zip(records, sequences, strict=True):
            text = self.tokenizer.decode_after(
                prompt, sequence[len(prompt) :], skip_special_tokens=skip is None or skip
            )
            record["generated_text"] = begin + text
        return records
