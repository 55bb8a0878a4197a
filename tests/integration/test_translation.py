"""An encoder-decoder model learns to translate by command line: to write words backwards, in
capitals."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.logging import metrics

from tests import commands
from tests.commands import USER_DIR, losses, records

SMALL = (
    *("--encoder-layers", "2", "--decoder-layers", "2", "--encoder-embed-dim", "64"),
    *("--encoder-ffn-embed-dim", "128", "--encoder-attention-heads", "4"),
    *("--decoder-attention-heads", "4", "--share-decoder-input-output-embed", "--dropout", "0"),
)


@pytest.fixture(scope="module")
def pairs_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binarise a corpus of words and their translations."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(1)
    for split, lines in (("train", 2000), ("valid", 96), ("test", 48)):
        words = [rng.choices("abcdefgh", k=rng.randint(2, 6)) for _ in range(lines)]
        written = [[letter.upper() for letter in reversed(word)] for word in words]
        for language, texts in (("word", words), ("back", written)):
            lines_of = "\n".join(" ".join(text) for text in texts)
            (folder / f"{split}.{language}").write_text(lines_of + "\n")
    prefixes = [arg for s in ("train", "valid", "test") for arg in (f"--{s}pref", folder / s)]
    commands.run(
        *("preprocess", "--source-lang", "word", "--target-lang", "back", "--workers", "1"),
        *("--destdir", folder / "bin", *prefixes),
    )
    return folder / "bin"


def train(data: Path, save_dir: Path, arch: str, updates: int, *flags: str) -> str:
    return commands.run(
        *("train", data, "--user-dir", USER_DIR, "--task", "translation", "--arch", arch),
        *(*SMALL, "--criterion", "sffn_label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
        *("--optimizer", "adam", "--lr", "3e-3", "--lr-scheduler", "inverse_sqrt"),
        *("--warmup-updates", "100", "--max-tokens", "800", "--max-update", f"{updates}", "--cpu"),
        *("--save-dir", save_dir, "--no-epoch-checkpoints", "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", "1", "--no-progress-bar", *flags),
    )


def generated(data: Path, checkpoint: Path, *flags: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return sample -> target, and sample -> generated text."""
    output = commands.apply("generate", data, checkpoint, "--batch-size", "16", *flags)
    wanted = dict(re.findall(r"^T-(\d+)\t(.*)$", output, re.M))
    return wanted, dict(re.findall(r"^H-(\d+)\t[-\d.e]+\t(.*)$", output, re.M))


def test_avgk_learns_to_translate(pairs_bin: Path, tmp_path: Path) -> None:
    flags = ("--sffn-block-size", "16", "--balance-loss-weight", "0.01")
    log = train(pairs_bin, tmp_path, "transformer_avgk", 350, *flags)
    last = records(log, "valid")[-1]
    assert float(last["valid_ppl"]) < 1.5
    assert {"valid_load_max_encoder_layer1", "valid_load_max_decoder_layer1"} <= last.keys()
    for beam in ("1", "4"):
        wanted, got = generated(
            pairs_bin, tmp_path / "checkpoint_best.pt", "--gen-subset", "test", "--beam", beam
        )
        assert len(wanted) == 48
        assert sum(got[sample] == text for sample, text in wanted.items()) >= 40
    answer = commands.apply(
        *("interactive", pairs_bin, tmp_path / "checkpoint_best.pt", "--beam", "4"),
        *("--source-lang", "word", "--target-lang", "back"),
        stdin="a b c\n",
    )
    assert re.search(r"^H-0\t\S+\tC B A$", answer, re.M)


SELECTORS = {
    "aoe": (),
    "avgk": ("--sffn-block-size", "16", "--avgk-key-ema", "0.9", "--avgk-value-norm"),
    "base": (),
    "gshard": ("--gshard-second-expert", "sampled"),
    "hash_layer": ("--hash-table", "bigram"),
    "hash_moe": ("--sffn-block-size", "16", "--sffn-route-scale", "1.5"),
    "lorkm": (),
    "moe": ("--sffn-block-size", "16"),
    "pkm": (),
    "pkm_ffn": (),
    "rand_hash": ("--sffn-block-size", "16"),
    "sigma_moe": ("--sffn-block-size", "16"),
    "switch": ("--sffn-capacity-factor", "1.0"),
    "vanilla_m": (),
}
FLAGS = {
    **{name: ("--sffn-selector", name, *flags) for name, flags in SELECTORS.items()},
    "mixed": ("--sffn-layers", "hash_layer:0,avgk/block_size=16:1", "--hash-table", "bigram"),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_selector_resumes_exactly(
    flags: tuple[str, ...], pairs_bin: Path, tmp_path: Path
) -> None:
    whole = train(pairs_bin, tmp_path / "whole", "transformer_sffn", 4, *flags)
    parts = train(pairs_bin, tmp_path / "parts", "transformer_sffn", 2, *flags)
    parts += train(pairs_bin, tmp_path / "parts", "transformer_sffn", 4, *flags)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4

    def model(run: str) -> dict[str, Any]:
        return torch.load(tmp_path / run / "checkpoint_last.pt", weights_only=True)["model"]

    torch.testing.assert_close(model("parts"), model("whole"), rtol=0, atol=0)
    # A model that has learned nothing would write 200 tokens.
    short = ("--max-len-b", "8")
    wanted, got = generated(pairs_bin, tmp_path / "whole" / "checkpoint_last.pt", *short)
    assert got.keys() == wanted.keys()


def test_training_that_computes_bleu_resumes(pairs_bin: Path, tmp_path: Path) -> None:
    """fairseq sums the counts of BLEU in arrays over validations, and saves them."""
    flags = ("--sffn-block-size", "16", "--eval-bleu", "--validate-interval-updates", "2")
    flags += ("--eval-bleu-args", '{"beam": 1, "max_len_b": 8}', "--batch-size-valid", "48")
    whole = train(pairs_bin, tmp_path / "whole", "transformer_avgk", 4, *flags)
    train(pairs_bin, tmp_path / "parts", "transformer_avgk", 3, *flags)
    state = torch.load(tmp_path / "parts" / "checkpoint_last.pt", weights_only=True)
    saved = {name for of in state["extra_state"]["metrics"].values() for _, name, *_ in of}
    assert "_bleu_counts" in saved
    train(pairs_bin, tmp_path / "parts", "transformer_avgk", 3, *flags)  # only restores
    assert isinstance(metrics.get_smoothed_value("valid", "_bleu_counts"), np.ndarray)
    resumed = train(pairs_bin, tmp_path / "parts", "transformer_avgk", 4, *flags)
    assert losses(resumed) == {4: losses(whole)[4]}
    assert records(resumed, "valid")[-1]["valid_bleu"] == records(whole, "valid")[-1]["valid_bleu"]
