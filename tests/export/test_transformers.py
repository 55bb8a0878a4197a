"""Exported folders in transformers, in an environment without fairseq.

``TRANSFORMERS_PYTHON`` names the Python of the environment (tests/README.md says how to make it).
Without it, the tests are skipped.
"""

from __future__ import annotations

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
        decoded = [greedy(model, prompt.unsqueeze(0), len(prompt) + NEW)[0] for prompt in prompts]
    result = {"rows": rows, "logits": logits, "prompts": prompts, "new": NEW}
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
    add_tokenizer(cases / "dense", tmp_path)
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


def add_tokenizer(case: Path, folder: Path) -> None:
    """Export another model, with a tokenizer, in place of a case's."""
    import sentencepiece
    from fairseq.data import Dictionary

    from fairseq_sffn.export.tokenizer_files import read_sentencepiece, write_tokenizer
    from fairseq_sffn.export.vendoring import copy_modules
    from fairseq_sffn.tools.export import TOKENIZER_MODULE

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["my fellow citizens of the united states"] * 20),
        model_prefix=str(folder / "spm"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    texts = ["my fellow citizens\nof the states", "é\n\n</s> 漢", "", "  two  spaces "]
    dictionary = Dictionary()
    for text in texts[:3]:
        for line in text.split("\n"):
            dictionary.encode_line(" ".join(processor.Encode(line, out_type=str)))
    settings = read_sentencepiece(folder / "spm.model", dictionary)
    write_tokenizer(settings, case / case.name, add_bos=False, positions=16)
    copy_modules([TOKENIZER_MODULE], [], case / case.name)
    expected = torch.load(case / "expected.pt", weights_only=True)
    expected["texts"] = []
    for text in texts:
        ids: list[int] = []
        for i, line in enumerate(text.split("\n")):
            ids += [EOS] * (i > 0)
            pieces = " ".join(processor.Encode(line, out_type=str))
            ids += dictionary.encode_line(pieces, append_eos=False, add_if_not_exist=False).tolist()
        expected["texts"].append((text, ids))
    torch.save(expected, case / "expected.pt")
