"""``fairseq-sffn export`` and ``fairseq-sffn import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sffn.errors import UsageError
from fairseq_sffn.export.gpt2_text import byte_letters
from fairseq_sffn.export.tensor_files import load_model, save_model
from fairseq_sffn.export.text import Text
from tests import commands
from tests.export.exported import write_checkpoint

EMBEDDING = "decoder.embed_tokens.weight"
TABLE = "decoder.layers.1.fc1.memory.values"
HASH = "decoder.layers.1.fc1.memory.selector.table"
"""Names of tensors of a model with hash tables."""


@pytest.fixture(scope="module")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model of several methods, and return its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    commands.train(data_bin, folder, "mixed", "--balance-loss-weight", "0.02")
    return folder / "checkpoint_last.pt"


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Compare tensors by bits and dtypes."""
    assert left.keys() == right.keys()
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def loaded(path: Path) -> dict[str, Any]:
    return dict(checkpoint_utils.load_checkpoint_to_cpu(str(path)))


def test_there_and_back(trained: Path, data_bin: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back.pt"
    printed = commands.sffn("export", trained, out, "--data", data_bin)
    assert printed.startswith(f"{out}: ") and printed.endswith(" 1 file, without a tokenizer\n")
    assert commands.sffn("import", out, back).startswith(f"{back}: ")
    same(loaded(back)["model"], loaded(trained)["model"])
    assert commands.evaluate(data_bin, back) == commands.evaluate(data_bin, trained)
    config = json.loads((out / "config.json").read_text())
    # hash_layer has no scores.
    assert config["balance_loss_weights"] == {"1": 0.02, "2": 0.02}
    # fairseq's generator never predicts padding, nor </s> directly behind the start.
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {**ids, "suppress_tokens": [1], "min_length": 2}
    assert str(data_bin) not in (out / "config.json").read_text()
    assert (out / "dict.txt").read_text() == (data_bin / "dict.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pt", "out"]


def test_several_files_and_checkpoints_in_shards(data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, "avgk")
    whole, parts = tmp_path / "checkpoint_last.pt", tmp_path / "parts.pt"
    commands.sffn("reshard", whole, parts, "--shards", "2")
    out, one = tmp_path / "out", tmp_path / "one"
    printed = commands.sffn("export", parts, out, "--data", data_bin, "--max-shard-size", "3KB")
    commands.sffn("export", whole, one, "--data", data_bin)
    assert len(list(out.glob("model-*.safetensors"))) > 3 and " files" in printed
    same(load_model(out), load_model(one))
    commands.sffn("import", out, tmp_path / "back.pt")
    commands.sffn("reshard", tmp_path / "back.pt", tmp_path / "again.pt", "--shards", "2")
    same(loaded(tmp_path / "again.pt")["model"], loaded(whole)["model"])


@pytest.mark.parametrize("method", ["rand_hash", "moe"])
def test_methods_there_and_back(method: str, tmp_path: Path) -> None:
    checkpoint, data, model = write_checkpoint(tmp_path / "in", method)
    commands.sffn("export", checkpoint, tmp_path / "out", "--data", data)
    commands.sffn("import", tmp_path / "out", tmp_path / "back.pt")
    state = loaded(tmp_path / "back.pt")
    same(dict(state["model"]), dict(model.state_dict()))
    assert state["cfg"].model._name == f"transformer_lm_{method}_tiny"


def test_half_precision_stays(tmp_path: Path) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "avgk", avgk_center=True)
    state = torch.load(checkpoint, weights_only=True)
    state["model"] = {
        name: tensor if "selector" in name or not tensor.is_floating_point() else tensor.half()
        for name, tensor in state["model"].items()
    }
    torch.save(state, checkpoint)
    commands.sffn("export", checkpoint, tmp_path / "out", "--data", data)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    commands.sffn("import", tmp_path / "out", tmp_path / "back.pt")
    same(dict(loaded(tmp_path / "back.pt")["model"]), dict(state["model"]))


def test_tokenizer(tmp_path: Path) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "dense")
    numbers = {letter: byte for byte, letter in byte_letters().items()}
    (tmp_path / "encoder.json").write_text(json.dumps(numbers))
    (tmp_path / "vocab.bpe").write_text("#version\n")
    (data / "dict.txt").write_text("".join(f"{ord('a') + i} {50 - i}\n" for i in range(16)))
    files = (tmp_path / "encoder.json", tmp_path / "vocab.bpe")
    out = tmp_path / "out"
    printed = commands.sffn("export", checkpoint, out, "--data", data, "--gpt2-bpe", *files)
    assert printed.endswith(" in 1 file\n")
    text = Text(json.loads((out / "sffn_tokenizer.json").read_text()))
    assert [text.id_of(piece) for piece in text.tokenize("abz\np")] == [4, 5, 3, 2, 19]
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 16
    pipelines = json.loads((out / "config.json").read_text())["custom_pipelines"]
    for path in (config["auto_map"]["AutoTokenizer"][0], pipelines["text-generation"]["impl"]):
        module, _, name = path.partition(".")
        assert f"class {name}(" in (out / f"{module}.py").read_text()
    other = ("--gpt2-bpe", files[0], files[1])
    (data / "dict.txt").write_text("".join(f"w{i} {50 - i}\n" for i in range(16)))
    with pytest.raises(UsageError, match=r"16 of the 16 symbols in dict\.txt are no"):
        commands.sffn("export", checkpoint, tmp_path / "b", "--data", data, *other)


def test_a_tokenizer_that_did_not_split_the_data_is_refused(tmp_path: Path) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "dense")
    numbers = {letter: byte for byte, letter in byte_letters().items()}
    others = {letter: (byte + 128) % 256 for letter, byte in numbers.items()}
    (data / "dict.txt").write_text("".join(f"{ord('a') + i} {50 - i}\n" for i in range(16)))
    (data / "text").write_text("97 98 99\n100 101\n")
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", data / "bin"),
        *("--srcdict", data / "dict.txt", "--trainpref", data / "text"),
    )
    (tmp_path / "vocab.bpe").write_text("#version\n")
    (tmp_path / "encoder.json").write_text(json.dumps(numbers))
    (tmp_path / "other.json").write_text(json.dumps(others))

    def export(encoder: str) -> None:
        files = (tmp_path / encoder, tmp_path / "vocab.bpe")
        out = tmp_path / f"{encoder}_out"
        commands.sffn("export", checkpoint, out, "--data", data / "bin", "--gpt2-bpe", *files)

    export("encoder.json")
    with pytest.raises(UsageError, match=r"^--gpt2-bpe .*other\.json .*: splits 2 of 2 words"):
        export("other.json")
    assert not (tmp_path / "other.json_out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--max-shard-size", "5 GB"), "--max-shard-size 5 GB: must be a size"),
        (("--sentencepiece", "no.model"), "--sentencepiece no.model: cannot be read"),
        (("--sentencepiece", "a", "--gpt2-bpe", "b", "c"), "--gpt2-bpe: there is --sentencep"),
        (("--gpt2-bpe", "b", "c"), "b: cannot be read"),
    ],
)
def test_wrong_flags_write_nothing(flags: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "avgk")
    with pytest.raises(UsageError, match=reason):
        commands.sffn("export", checkpoint, tmp_path / "out", "--data", data, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "dense")
    for command in (
        ("export", checkpoint, data, "--data", data),
        ("import", tmp_path, checkpoint),
    ):
        with pytest.raises(UsageError, match="is there already"):
            commands.sffn(*command)
    with pytest.raises(UsageError, match="there is no folder"):
        commands.sffn("export", checkpoint, tmp_path / "a" / "b", "--data", data)


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    options = dict(adaptive_softmax_cutoff="5,10", share_decoder_input_output_embed=False)
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "dense")
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"] |= options
    torch.save(state, checkpoint)
    with pytest.raises(UsageError, match=r"^--adaptive-softmax-cutoff 5,10: .* adaptive softmax$"):
        commands.sffn("export", checkpoint, tmp_path / "out", "--data", data)
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "avgk", sffn_eval_capacity_factor=1.0)
    with pytest.raises(UsageError, match=r"--sffn-eval-capacity-factor 1\.0"):
        commands.sffn("export", checkpoint, tmp_path / "out", "--data", data)
    zero = "{'sffn_eval_capacity_factor': 0}"
    commands.sffn("export", checkpoint, tmp_path / "out", "--data", data, "--model-overrides", zero)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(UsageError, match=reason):
            commands.sffn("import", tmp_path, tmp_path / "back.pt")
        assert not (tmp_path / "back.pt").exists()

    refused("config.json: cannot be read")
    (tmp_path / "config.json").write_text("{}")
    refused("is not of fairseq-sffn export")
    (tmp_path / "config.json").write_text('{"fairseq": {"model": {}, "task": {}}}')
    refused("model.safetensors: cannot be read")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(TABLE), f"has no {TABLE}, which the model of config.json has"),
        (
            lambda tensors: tensors.update(extra=torch.zeros(1)),
            "extra is not in the model of config.json",
        ),
        (
            lambda tensors: tensors.update({TABLE: tensors[TABLE][:-1]}),
            rf"{TABLE} has shape \(511, 16\), and \(512, 16\) in the model",
        ),
        (
            lambda tensors: tensors.update({TABLE: tensors[TABLE].int()}),
            rf"{TABLE} has dtype torch\.int32, and torch\.float32 in the model",
        ),
        (
            lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:-1]}),
            rf"{EMBEDDING} has shape \(19, 16\), and \(20, 16\) in the model",
        ),
        (
            lambda tensors: tensors.update({HASH: tensors[HASH].float()}),
            rf"{HASH} has dtype torch\.float32, and torch\.int16 in the model",
        ),
    ],
)
def test_tensors_of_other_models_are_refused(change: Any, reason: str, tmp_path: Path) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "rand_hash")
    out = tmp_path / "out"
    commands.sffn("export", checkpoint, out, "--data", data)
    tensors = load_model(out)
    change(tensors)
    save_model(tensors, out, 10**9)
    with pytest.raises(UsageError, match=f"^{out}: {reason}") as caught:
        commands.sffn("import", out, tmp_path / "back.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("vocab_size", 21, rf"{EMBEDDING} has shape \(20, 16\), and \(21, 16\)"),
        ("vocab_size", 10**12, "vocab_size 1000000000000: must be between"),
        ("vocab_size", "x", "vocab_size x: must be between"),
        ("decoder_layers", 4, "has no decoder.layers.3"),
        ("decoder_attention_heads", 3, "^--decoder-attention-heads 3: must divide"),
        ("_name", "nothing", "fairseq cannot build this model: "),
    ],
)
def test_tensors_of_another_configuration_are_refused(
    key: str, value: Any, reason: str, tmp_path: Path
) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "rand_hash")
    out = tmp_path / "out"
    commands.sffn("export", checkpoint, out, "--data", data)
    config = json.loads((out / "config.json").read_text())
    (config if key in config else config["fairseq"]["model"])[key] = value
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=reason) as caught:
        commands.sffn("import", out, tmp_path / "back.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "back.pt").exists()


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    checkpoint, data, _ = write_checkpoint(tmp_path / "in", "dense")
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"] = {"_name": "transformer_avgk"}
    torch.save(state, checkpoint)
    with pytest.raises(UsageError, match=r"^--arch transformer_avgk: fairseq-sffn export is for"):
        commands.sffn("export", checkpoint, tmp_path / "out", "--data", data)


def test_stock_fairseq_models(data_bin: Path, tmp_path: Path) -> None:
    """fairseq's own transformer_lm, which has none of the plugin's options."""
    commands.run(
        *("train", data_bin, "--task", "language_modeling", "--arch", "transformer_lm"),
        *(
            *commands.SMALL,
            "--optimizer",
            "adam",
            "--lr",
            "1e-3",
            "--tokens-per-sample",
            "16",
            "--cpu",
        ),
        *("--batch-size", "8", "--max-update", "2", "--save-dir", tmp_path / "in"),
    )
    checkpoint, out, back = tmp_path / "in/checkpoint_last.pt", tmp_path / "out", tmp_path / "b.pt"
    commands.sffn("export", checkpoint, out, "--data", data_bin)
    commands.sffn("import", out, back)
    assert commands.evaluate(data_bin, back) == commands.evaluate(data_bin, checkpoint)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and not config["memories"]
