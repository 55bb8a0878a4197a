"""Runs lm-evaluation-harness on a language model of fairseq.

    python examples/zero_shot/lm_eval_adapter.py --model fairseq --model_args \
        checkpoint=CKPT/checkpoint_best.pt data=DATA-BIN bpe=sentencepiece \
        sentencepiece_model=spm.model --include_path runs/lm_eval --tasks zero_shot

All flags are those of `lm_eval`, which gains the model `fairseq`. Its arguments (`--model_args`):

    checkpoint, data, bpe   as for `fairseq-sffn zero-shot`; the checkpoint may be sharded
    max_tokens              tokens in a batch, with padding (default: 4096)
    max_gen_toks            tokens that are generated if the task does not say (default: 256, or
                            half of the model's context if that is less)
    model_overrides         as for `fairseq-eval-lm`
    others                  options of the encoder: sentencepiece_model, gpt2_encoder_json, ...

A line break is `</s>`, in contexts, continuations and generated text, as fairseq-preprocess writes
it. `</s>` therefore does not end a generated text. Every text begins after fairseq's start token.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fairseq_sffn.errors import UsageError, flag
from fairseq_sffn.tools.likelihood import Encoder, Scorer, batches
from fairseq_sffn.tools.zero_shot import (
    build_encoder,
    build_scorer,
    check_known,
    parse_overrides,
)

BATCH_SIZES = (1, "1", "auto", None)
"""Values of the harness's ``--batch_size`` that ask for nothing. 1 is its default."""
PADDING = "madeupword"
"""Start of the types by which fairseq fills up a dictionary."""


@register_model("fairseq")
class FairseqLM(TemplateLM):
    """A fairseq language model, for lm-evaluation-harness.

    The harness splits text into context and continuation, cuts long texts into windows, and counts.
    :class:`~fairseq_sffn.tools.likelihood.Scorer` computes the log-likelihoods.

    Args:
        checkpoint: the .pt file, sharded or not.
        data: folder with the model's ``dict.txt``.
        bpe: name of fairseq's encoder of the training text.
        max_tokens: tokens of a batch, padding included.
        max_gen_toks: tokens that :meth:`generate_until` generates by default; ``None``: 256, or
            half of the model's positions if that is less.
        model_overrides: option of the model or task -> value, or its text.
        device: where the model runs; ``None``: on the GPU if there is one.
        batch_size: batches are in tokens, so the harness's number of sequences must be 1.
        max_batch_size: must be ``None``.
        options: options of the encoder.
    """

    def __init__(
        self,
        checkpoint: str,
        data: str,
        bpe: str,
        max_tokens: int = 4096,
        max_gen_toks: int | None = None,
        model_overrides: dict[str, Any] | str = "{}",
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_size not in BATCH_SIZES or max_batch_size is not None:
            raise UsageError(
                f"--batch_size {batch_size}: batches are in tokens; give --model_args max_tokens=N"
            )
        flags = [word for name, value in options.items() for word in (flag(name), str(value))]
        bpe_encoder = build_encoder(bpe, flags)
        if isinstance(model_overrides, str):
            model_overrides = parse_overrides(model_overrides)
        # The harness asks for a GPU by default, whether or not there is one.
        wanted = str(device or "cuda")
        there = torch.cuda.is_available() or not wanted.startswith("cuda")
        self._device = torch.device(wanted if there else "cpu")
        self.scorer: Scorer = build_scorer(
            Path(checkpoint), Path(data), model_overrides, int(max_tokens), self._device
        )
        self.encoder = Encoder(bpe_encoder, self.scorer.dictionary)
        self.bpe, self.data = bpe, Path(data)
        self.max_length = self.scorer.positions
        self.max_gen_toks = int(max_gen_toks or min(256, self.max_length // 2))

    @property
    def eot_token_id(self) -> int:
        """The token that begins a text."""
        return self.scorer.start

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the token ids of a text, after the start token unless ``add_special_tokens`` is
        false."""
        start = [] if add_special_tokens is False else [self.scorer.start]
        return [*start, *self.encoder.encode(string)]

    # Log-likelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one.

        Args:
            requests: texts of context and continuation, for the cache; token ids of the context,
                which begin with the start token or are the end of a longer text; token ids of the
                continuation.
            disable_tqdm: print no progress.
        """
        for texts, _context, continuation in requests:
            if not continuation:
                raise UsageError(f"no token is left of a continuation: {texts}")
        sequences = [([*before, *after], len(after)) for _, before, after in requests]
        self._check_known(sequences)
        scores = self.scorer.score_sequences(sequences, Progress(disable_tqdm))
        if any(math.isnan(score.log_likelihood) for score in scores):
            raise UsageError("the checkpoint predicts what is not a number")
        found = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _before, _after), score in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, in windows of the model's context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.scorer.start, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm) if windows else []
        for number, (log_likelihood, _) in zip(owners, found, strict=True):
            totals[number] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _check_known(self, sequences: list[tuple[list[int], int]]) -> None:
        if sequences:
            unknown = self.scorer.dictionary.unk()
            check_known(sequences, unknown, f"bpe={self.bpe}: requests", self.data)

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each context, up to one of its stop sequences.

        Contexts are cut at the left, so that the new tokens fit into the model's context.

        Raises:
            UsageError: a request asks for samples, or for more tokens than the model's context.
        """
        prompts: list[Prompt] = []
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            if options["do_sample"]:
                raise UsageError("generation: only greedy decoding is supported (do_sample=False)")
            length = options["max_gen_toks"]
            if not 0 < length < self.max_length:
                raise UsageError(
                    f"generation: max_gen_toks={length} does not fit the model's context of "
                    f"{self.max_length} tokens; give --gen_kwargs max_gen_toks=N"
                )
            tokens = self.tok_encode(context)[-(self.max_length - length) :]
            stops = handle_stop_sequences(options.get("until"), eos=None)
            prompts.append(Prompt(self, tokens, length, stops))
        self._check_known([(prompt.tokens, 0) for prompt in prompts])
        lengths, done = [len(prompt.tokens) + prompt.length for prompt in prompts], 0
        progress = Progress(disable_tqdm)
        for batch in batches(lengths, self.scorer.max_tokens):
            self._decode([prompts[i] for i in batch])
            done += len(batch)
            progress(done, len(prompts))
        for request, prompt in zip(requests, prompts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, prompt.text)
        return [prompt.text for prompt in prompts]

    @torch.no_grad()
    def _decode(self, prompts: list[Prompt]) -> None:
        """Decode a batch greedily, a position at a time. Rows that are done go on unheard."""
        dictionary = self.scorer.dictionary
        never = [dictionary.bos(), dictionary.pad(), dictionary.unk()]
        never += [i for i in range(len(dictionary)) if dictionary[i].startswith(PADDING)]
        never = [token for token in never if token < self.scorer.types]
        tokens_BT = torch.tensor([[prompt.tokens[0]] for prompt in prompts], device=self._device)
        state: dict[str, Any] = {}
        while not all(prompt.done for prompt in prompts):
            position = tokens_BT.shape[1]
            output = self.scorer.model(tokens_BT, incremental_state=state)
            log_probs_BTV = self.scorer.model.get_normalized_probs(output, log_probs=True)
            log_probs_BV = log_probs_BTV[:, -1].float()
            log_probs_BV[:, never] = -math.inf
            best = log_probs_BV.argmax(1).tolist()
            following = [
                prompt.tokens[position] if position < len(prompt.tokens) else token
                for prompt, token in zip(prompts, best, strict=True)
            ]
            for prompt, token in zip(prompts, following, strict=True):
                if position >= len(prompt.tokens):
                    prompt.add(token)
            column_B1 = torch.tensor(following, device=self._device)[:, None]
            tokens_BT = torch.cat([tokens_BT, column_B1], 1)


class Prompt:
    """A context, and what is generated after it.

    Args:
        lm: the model.
        tokens: token ids of the context.
        length: number of tokens to generate at most.
        stops: texts that end the generation. They are no part of its text.
    """

    def __init__(self, lm: FairseqLM, tokens: list[int], length: int, stops: list[str]) -> None:
        self.lm, self.tokens, self.length, self.stops = lm, tokens, length, stops
        self.start = tokens[0] == lm.scorer.start
        self.generated: list[int] = []
        self.text, self.done = "", False

    def add(self, token: int) -> None:
        """Add the next token, unless the text is complete."""
        if self.done:
            return
        self.generated.append(token)
        self.text = self._decode()
        stopped = any(stop and stop in self.text for stop in self.stops)
        self.done = stopped or len(self.generated) == self.length
        self.text = postprocess_generated_text(self.text, self.stops, None)

    def _decode(self) -> str:
        """Return the generated text. Its first token may need the context to be decoded: it has a
        space, or part of a character."""
        context = self.tokens[1:] if self.start else self.tokens
        before = self.lm.encoder.decode(context)
        after = self.lm.encoder.decode([*context, *self.generated])
        if after.startswith(before):
            return after[len(before) :]
        return self.lm.encoder.decode(self.generated)


class Progress:
    """Prints to stderr how much is done, in tenths."""

    def __init__(self, disabled: bool) -> None:
        self.disabled, self.tenths = disabled, 0

    def __call__(self, done: int, of: int) -> None:
        if not self.disabled and 10 * done // of > self.tenths:
            self.tenths = 10 * done // of
            print(f"fairseq: {done / of:.0%}", file=sys.stderr, flush=True)


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
