"""Exported folders in transformers, in an environment without fairseq.

``TRANSFORMERS_PYTHON`` names the Python of the environment (tests/README.md says how to make it).
Without it, the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_sffn.criterions.sffn_cross_entropy import (
    SFFNCrossEntropyConfig,
    SFFNCrossEntropyCriterion,
)
from tests import commands
from tests.export.exported import greedy, write_checkpoint
from tests.models.small_lm import METHODS, language_modeling, pad, random_tokens

PYTHONS = [path for path in os.environ.get("TRANSFORMERS_PYTHON", "").split(":") if path]
NEW = 6
EOS = 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in (*METHODS, "mixed")},
    "bigram": ("hash_layer", dict(hash_table="bigram")),
    "balanced_bias": ("switch", dict(sffn_balance_rate=0.01)),
    "centred": ("avgk", dict(avgk_center=True)),
    "gated_shared": (
        "switch",
        dict(
            sffn_glu="silu",
            sffn_glu_width=64,
            sffn_shared_blocks=1,
            sffn_active_blocks=2,
            sffn_block_size=32,
        ),
    ),
    "learned_untied": (
        "avgk",
        dict(decoder_learned_pos=True, share_decoder_input_output_embed=False),
    ),
    "post_norm": ("dense", dict(decoder_normalize_before=False)),
}
pytestmark = [pytest.mark.slow, pytest.mark.integration]


def expected_of(name: str, model: Any) -> dict[str, Any]:
    """Compute what transformers has to compute, with fairseq."""
    rows = [random_tokens(length) for length in (7, 4, 1)]
    prompts = [random_tokens(length) for length in (4, 2, 1)]
    with torch.no_grad():
        logits = list(model(pad(rows))[0])
        features, extra = model.decoder.extract_features(rows[0].unsqueeze(0), encoder_out=None)
        decoded = [greedy(model, prompt.unsqueeze(0), len(prompt) + NEW)[0] for prompt in prompts]
    result = {"rows": rows, "logits": logits, "prompts": prompts, "new": NEW}
    result["hidden"] = [state.transpose(0, 1) for state in extra["inner_states"][:-1]]
    result["hidden"].append(features)
    result["greedy"] = [ids[: ids.tolist().index(EOS)].tolist() for ids in decoded]
    if name not in ("base", "sigma_moe", "centred"):  # training differs from evaluation
        result |= training_of(model, rows)
    return result


def training_of(model: Any, rows: list[Tensor]) -> dict[str, Any]:
    """Compute the loss of fairseq's criterion per token in nats, and its gradients."""
    sources, targets = pad([row[:-1] for row in rows[:2]]), pad([row[1:] for row in rows[:2]])
    criterion = SFFNCrossEntropyCriterion(
        SFFNCrossEntropyConfig(sentence_avg=False), language_modeling()
    )
    sample = {
        "net_input": {"src_tokens": sources, "src_lengths": torch.tensor([6, 3])},
        "target": targets,
        "ntokens": 9,
    }
    loss, size, _ = criterion(model.train(), sample)
    model.zero_grad()
    (loss / size).backward()
    model.eval()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"sources": sources, "targets": targets, "loss": (loss / size).detach(), "grads": grads}


@pytest.mark.skipif(not PYTHONS, reason="TRANSFORMERS_PYTHON names no Python")
@pytest.mark.parametrize("python", PYTHONS)
def test_transformers(python: str, tmp_path: Path) -> None:
    cases = tmp_path / "cases"
    cases.mkdir()
    for name, (method, options) in CASES.items():
        checkpoint, data, model = write_checkpoint(tmp_path / name, method, **options)
        (cases / name).mkdir()
        commands.sffn("export", checkpoint, cases / name / name, "--data", data)
        torch.save(expected_of(name, model), cases / name / "expected.pt")
    add_tokenizer(cases / "dense", tmp_path, byte_fallback=True, vocab_size=290)
    plain = dict(normalization_rule_name="identity", vocab_size=40, character_coverage=1.0)
    add_tokenizer(cases / "mixed", tmp_path, **plain)
    add_tokenizer(cases / "avgk", tmp_path, model_type="unigram", **plain)
    done = subprocess.run(
        [python, "-I", "-W", "ignore", Path(__file__).with_name("in_transformers.py"), cases],
        capture_output=True,
        text=True,
        env={
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert done.stdout.split()[:-2] == sorted(CASES)
    # What transformers saved comes back to fairseq.
    back = tmp_path / "back.pt"
    commands.sffn("import", cases / "rand_hash" / "rand_hash_again", back)
    saved = torch.load(back, weights_only=True)["model"]
    original = torch.load(tmp_path / "rand_hash" / "model.pt", weights_only=True)["model"]
    torch.testing.assert_close(dict(saved), dict(original), rtol=0, atol=0)


TEXTS = [
    "my fellow citizens\nof the states",
    "\u00e9\n\n</s> \u6f22",
    "",
    "  two  spaces ",
    " a",
    "my\tfellow\ttabs \t",
    "hard\u00a0space \u00a0of\u00a0",
    "\n\n of\n \n\nthe\n\n",
    "\u6f22 of \u6f22\u5b57\u6f22 the\n\u6f22",
    "\r of\u2028the\u3000states",
]


def add_tokenizer(case: Path, folder: Path, **trainer: Any) -> None:
    """Put a tokenizer into a case, as the export of another model does."""
    import sentencepiece
    from fairseq.data import Dictionary

    from fairseq_sffn.export.tokenizer_files import read_sentencepiece, write_tokenizer
    from fairseq_sffn.export.vendoring import copy_modules
    from fairseq_sffn.tools.export import PIPELINES, TOKENIZER_MODULE

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["my fellow citizens of the united states"] * 20),
        model_prefix=str(folder / "spm"),
        minloglevel=2,
        hard_vocab_limit=False,
        **{"model_type": "bpe", **trainer},
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    dictionary = Dictionary()
    for text in TEXTS[:2]:
        for line in text.split("\n"):
            dictionary.encode_line(" ".join(processor.Encode(line, out_type=str)))
    settings = read_sentencepiece(folder / "spm.model", dictionary)
    write_tokenizer(settings, case / case.name, add_bos=False, positions=16)
    copy_modules([TOKENIZER_MODULE], [], case / case.name)
    config = json.loads((case / case.name / "config.json").read_text())
    config["custom_pipelines"] = PIPELINES
    (case / case.name / "config.json").write_text(json.dumps(config))
    expected = torch.load(case / "expected.pt", weights_only=True)
    expected["texts"] = []
    for text in TEXTS:
        ids: list[int] = []
        for i, line in enumerate(text.split("\n")):
            ids += [EOS] * (i > 0)
            pieces = " ".join(processor.Encode(line, out_type=str))
            ids += dictionary.encode_line(pieces, append_eos=False, add_if_not_exist=False).tolist()
        expected["texts"].append((text, ids))
    torch.save(expected, case / "expected.pt")
