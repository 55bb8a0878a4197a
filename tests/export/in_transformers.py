"""Loads exported folders with transformers, and compares them with fairseq's results.

``test_transformers.py`` runs it in an environment that has PyTorch and transformers, and no
fairseq. Its argument is a folder of cases. A case is an exported folder of
its name, and ``expected.pt`` with what fairseq computed.
"""

import importlib.util
import logging
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.pipelines.text_generation import ReturnType

CLOSE = dict(rtol=0, atol=1e-5)
PAD, EOS = 1, 2


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = [torch.nn.functional.pad(row, (length - len(row), 0), value=PAD) for row in rows]
    return torch.stack(ids), torch.stack([i.ne(PAD).long() for i in ids])


def check_logits(model: Any, expected: dict[str, Any]) -> None:
    """Compare padding on both sides, and incremental decoding."""
    rows, logits = expected["rows"], expected["logits"]
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    left, mask = left_padded(rows)
    with torch.no_grad():
        of_right = model(input_ids=right, attention_mask=right.ne(PAD).long()).logits
        of_left = model(input_ids=left, attention_mask=mask).logits
        for kept in (1, torch.tensor([0, 2])):
            some = model(input_ids=left, attention_mask=mask, logits_to_keep=kept).logits
            wanted = of_left[:, -1:] if isinstance(kept, int) else of_left[:, kept]
            torch.testing.assert_close(some, wanted, **CLOSE)
        steps, cache = [], None
        name = "cache" if "cache" in model(input_ids=left) else "past_key_values"
        for begin, end in ((0, 3), (3, 4), (4, left.shape[1])):
            output = model(
                input_ids=left[:, begin:end],
                attention_mask=mask[:, :end],
                context_ids=left[:, :begin],
                use_cache=True,
                **{name: cache},
            )
            cache = output[name]
            steps.append(output.logits)
    for i, row in enumerate(rows):
        wanted = logits[i][: len(row)]
        torch.testing.assert_close(of_right[i, : len(row)], wanted, **CLOSE)
        torch.testing.assert_close(of_left[i, -len(row) :], wanted, **CLOSE)
        torch.testing.assert_close(torch.cat(steps, dim=1)[i, -len(row) :], wanted, **CLOSE)


def check_hidden_states(model: Any, expected: dict[str, Any]) -> None:
    """The embeddings, the outputs of the layers but the last, and the input of the logits."""
    rows = expected["rows"]
    with torch.no_grad():
        output = model(input_ids=rows[0].unsqueeze(0), output_hidden_states=True)
        assert model(input_ids=rows[0].unsqueeze(0)).hidden_states is None
    torch.testing.assert_close(list(output.hidden_states), expected["hidden"], **CLOSE)
    torch.testing.assert_close(
        model.decoder.logits(output.hidden_states[-1]), output.logits, **CLOSE
    )
    refused("output_attentions: ", model, input_ids=rows[0].unsqueeze(0), output_attentions=True)


def check_length(model: Any) -> None:
    """The model refuses sequences longer than its context, and padding does not count."""
    most = model.config.max_position_embeddings
    ids = torch.full((1, most + 1), 5)
    refused(f"a sequence of {most + 1} tokens is longer than .* {most} ", model, input_ids=ids)
    ids[0, 0] = PAD
    assert model(input_ids=ids, attention_mask=ids.ne(PAD).long()).logits.isfinite().all()


def refused(
    message: str, call: Any, *args: Any, error: type[Exception] = ValueError, **kwargs: Any
) -> None:
    try:
        call(*args, **kwargs)
    except error as found:
        assert re.match(message, str(found)) and "\n" not in str(found), found
    else:
        raise AssertionError(f"not refused: {message}")


def check_generation(model: Any, expected: dict[str, Any]) -> None:
    """Compare greedy decoding: of each prompt alone, and of all in one padded batch."""
    prompts, wanted = expected["prompts"], expected["greedy"]
    starts = [torch.cat([torch.tensor([EOS]), prompt]) for prompt in prompts]
    new = expected["new"]

    def until_end(ids: Tensor) -> list[int]:
        found: list[int] = ids.tolist()
        return found[: found.index(EOS)] if EOS in found else found

    batch, mask = left_padded(starts)
    together = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=new)
    slow = model.generate(
        batch, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=False
    )
    assert torch.equal(together, slow)
    for i, start in enumerate(starts):
        alone = model.generate(start.unsqueeze(0), do_sample=False, max_new_tokens=new)
        continuation = wanted[i][len(start) - 1 :]
        assert until_end(alone[0, len(start) :]) == continuation[:new], (alone, continuation)
        assert until_end(together[i, batch.shape[1] :]) == continuation[:new]
    beams = model.generate(batch, attention_mask=mask, num_beams=2, max_new_tokens=4)
    assert beams.shape[0] == len(prompts) and not beams[:, batch.shape[1] :].eq(PAD).all()


def check_training(model: Any, expected: dict[str, Any]) -> None:
    """Compare the loss and gradients with those of fairseq's criterion, per token."""
    labels = expected["targets"].masked_fill(expected["targets"].eq(PAD), -100)
    # Labels are shifted in the model.
    labels = torch.nn.functional.pad(labels, (1, 0), value=-100)
    ids = torch.nn.functional.pad(expected["sources"], (0, 1), value=PAD)
    model.train()
    output = model(input_ids=ids, labels=labels, attention_mask=ids.ne(PAD).long())
    torch.testing.assert_close(output.loss, expected["loss"], rtol=1e-5, atol=1e-5)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        wanted = expected["grads"][name]
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)
    model.end_update()
    model.zero_grad()
    model.eval()
    plain = model(input_ids=ids, labels=labels, attention_mask=ids.ne(PAD).long())
    assert plain.aux_loss is None


def check_saving(model: Any, folder: Path, again: Path) -> None:
    """Save and load again, also in several files, and from the saved copy of the code."""
    model.save_pretrained(again, max_shard_size="20KB")
    second = load(again)
    assert second.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert (
        second.config.fairseq == AutoConfig.from_pretrained(folder, trust_remote_code=True).fairseq
    )


def check_tokenizer(folder: Path, expected: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text, ids in expected["texts"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer(text)["input_ids"] == [EOS, *ids], text
    text = expected["texts"][0][0]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    batch = tokenizer([text, text + " " + text], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == PAD and batch["attention_mask"][0, 0] == 0
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)[0] == text
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (1, 3, 2)
    assert len(tokenizer) == len(tokenizer.get_vocab())
    found = tokenizer(text, return_special_tokens_mask=True)
    assert found["special_tokens_mask"] == [int(i in (1, 2, 3)) for i in found["input_ids"]]
    assert pickle.loads(pickle.dumps(tokenizer))(text)["input_ids"] == found["input_ids"]
    refused("'new' cannot be added", tokenizer.add_tokens, ["new"])
    piece = tokenizer.tokenize(text)[0]
    refused("'.*' cannot be added", tokenizer.add_tokens, [piece])
    refused("'<x>' cannot be added", tokenizer.add_special_tokens, {"pad_token": "<x>"})
    for batch_or_text in (text, [text]):
        refused(
            "return_offset",
            *(tokenizer, batch_or_text),
            return_offsets_mapping=True,
            error=NotImplementedError,
        )
    tokenizer.save_pretrained(folder / "saved_tokenizer")
    saved = AutoTokenizer.from_pretrained(folder / "saved_tokenizer", trust_remote_code=True)
    assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    check_long_text(folder, text)
    check_pipeline(folder, [text for text, _ in expected["texts"]])


def check_long_text(folder: Path, text: str) -> None:
    """A text longer than the context gives a warning, once for each tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    logger = logging.getLogger("transformers.tokenization_utils_base")
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    length = len(tokenizer(" ".join([text] * 20))["input_ids"])
    logger.removeHandler(handler)
    (message,) = records
    assert f"({length} > {tokenizer.model_max_length})" in message


def check_pipeline(folder: Path, texts: list[str]) -> None:
    """Wherever a text is cut, the prompt and what the pipeline adds are the text of all ids."""
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    tokenizer = pipe.tokenizer
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        for at in range(1, len(ids) + 1):
            prompt = tokenizer.decode(ids[:at], skip_special_tokens=True)
            outputs = {
                "generated_sequence": torch.tensor([[ids]]),
                "input_ids": torch.tensor([ids[:at]]),
                "prompt_text": prompt,
            }
            (full,) = pipe.postprocess(outputs)
            (new,) = pipe.postprocess(outputs, return_type=ReturnType.NEW_TEXT)
            assert full["generated_text"] == prompt + new["generated_text"]
            if not prompt.endswith("\ufffd"):  # within a character
                assert full["generated_text"] == whole, (text, prompt, full)
    pipe.model.save_pretrained(folder / "saved_by_pipeline")
    # Token ids begin with the start token, or continue a line.
    assert tokenizer.decode(EOS) == tokenizer.eos_token
    first, *others = tokenizer(" ".join(texts[0].split()))["input_ids"]
    assert first == EOS and not tokenizer.decode([first, *others], True).startswith(" ")
    assert tokenizer.decode([first, *others]).startswith(tokenizer.eos_token)
    assert tokenizer.decode([PAD, first, *others], True) == tokenizer.decode([first, *others], True)


def check_half_precision(folder: Path) -> None:
    """In half precision, running means and biases stay in fp32."""
    model = load(folder, **{dtype_argument(): torch.bfloat16})
    assert model.decoder.embed_tokens.weight.dtype == torch.bfloat16
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name.endswith(("balancer.bias", "hidden_totals")):
            assert buffer.dtype == torch.float32, name
    assert model(input_ids=torch.tensor([[2, 5, 6]])).logits.isfinite().all()


def dtype_argument() -> str:
    return "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"


def main(cases: Path) -> None:
    assert importlib.util.find_spec("fairseq") is None, "fairseq is installed here"
    assert importlib.util.find_spec("fairseq_sffn") is None, "fairseq_sffn is installed here"
    for case in sorted(cases.iterdir()):
        expected = torch.load(case / "expected.pt", weights_only=True)
        model = load(case / case.name)
        assert not any(memory.balancer.loads.any() for memory in model.decoder.memories().values())
        check_logits(model, expected)
        check_hidden_states(model, expected)
        check_length(model)
        check_generation(model, expected)
        check_saving(model, case / case.name, case / f"{case.name}_again")
        if "loss" in expected:
            check_training(model, expected)
        if "texts" in expected:
            check_tokenizer(case / case.name, expected)
        check_half_precision(case / case.name)
        print(case.name, flush=True)
    print(f"transformers {transformers.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
