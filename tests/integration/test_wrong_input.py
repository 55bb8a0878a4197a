"""Wrong input stops a command with one line that names flag and value, and loses nothing."""

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import commands
from tests.commands import USER_DIR, refusal


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train models, and return their folders."""
    folder = tmp_path_factory.mktemp("runs")
    for model in sorted({model for model, *_ in (*TRAINING, *RESUMING)}):
        commands.train(data_bin, folder / model, model, "--max-update", "2")
    return folder


def refused_training(
    data: Path, save_dir: Path, model: str, *flags: str, task: str = "language_modeling"
) -> str:
    """Return the line with which training stops. The folder of the checkpoints must not change."""
    before = contents(save_dir)
    flags = ("--task", task, "--max-update", "4", *flags)
    line = refusal(lambda: commands.train(data, save_dir, model, *flags))
    assert contents(save_dir) == before
    return line


TRAINING = [
    # Sizes
    ("avgk", "--sffn-block-size 7", "does not divide --decoder-ffn-embed-dim 32"),
    ("avgk", "--sffn-block-size 64", "does not divide --decoder-ffn-embed-dim 32"),
    ("avgk", "--sffn-block-size 7 --sffn-active-blocks 2", "does not divide the 512 cells"),
    ("avgk", "--sffn-block-size 0", "must be at least 1"),
    ("avgk", "--sffn-block-size -8", "must be at least 1"),
    ("avgk", "--sffn-active-blocks 65", "is more than the 64 blocks"),
    ("avgk", "--sffn-active-blocks 0", "must be at least 1"),
    ("avgk", "--sffn-active-blocks -1", "must be at least 1"),
    ("switch", "--sffn-active-blocks 17", "is more than the 16 blocks"),
    ("hash_layer", "--sffn-active-blocks 2", "hash_layer uses one block"),
    ("avgk", "--sffn-expansion 0", "must be at least 1"),
    ("avgk", "--sffn-expansion -2", "must be at least 1"),
    ("avgk", "--sffn-freq 3", "must be 1 to --decoder-layers 2"),
    ("avgk", "--sffn-freq 0", "must be 1 to --decoder-layers 2"),
    ("avgk", "--sffn-freq -1", "must be 1 to --decoder-layers 2"),
    ("avgk", "--sffn-shared-blocks -1", "must not be negative"),
    ("avgk", "--sffn-shared-blocks 4", "leaves none of the 4 active blocks to the other 60"),
    ("lorkm", "--sffn-glu silu", "computes no cells from a key table"),
    ("dense", "--sffn-glu-width 64", "needs --sffn-glu"),
    ("dense", "--sffn-glu-width 0 --sffn-glu silu", "must be at least 1"),
    ("avgk", "--sffn-block-size 48 --sffn-glu silu", "does not divide --sffn-glu-width 64"),
    # Numbers out of range
    ("switch", "--sffn-capacity-factor -1.0", "must be positive and finite, or 0 for dropless"),
    ("switch", "--sffn-capacity-factor nan", "must be positive and finite, or 0 for dropless"),
    ("switch", "--sffn-capacity-factor inf", "must be positive and finite, or 0 for dropless"),
    (
        "switch",
        "--sffn-eval-capacity-factor -0.5",
        "must be positive and finite, or 0 for dropless",
    ),
    ("avgk", "--sffn-init-scale 0.0", "must be positive"),
    ("avgk", "--sffn-init-scale -1.0", "must be positive"),
    ("avgk", "--sffn-init-scale nan", "must be positive and finite"),
    ("avgk", "--sffn-init-scale inf", "must be positive and finite"),
    ("avgk", "--activation-dropout 1.0", "must be at least 0 and below 1"),
    ("avgk", "--activation-dropout -0.1", "must be at least 0 and below 1"),
    ("avgk", "--relu-dropout 2.0", "must be at least 0 and below 1"),
    ("switch", "--balance-loss-weight -1.0", "must not be negative"),
    ("switch", "--z-loss-weight -0.1", "must not be negative"),
    ("switch", "--balance-loss-weight nan", "must"),
    ("switch", "--z-loss-weight inf", "must"),
    ("avgk", "--decoder-embed-dim 0", "must be at least 1"),
    ("avgk", "--decoder-ffn-embed-dim -32", "must be at least 1"),
    ("avgk", "--decoder-layers 0", "must be at least 1"),
    # Choices that contradict each other
    ("sffn", "--hash-table random", "is for the selector hash_layer"),
    ("avgk", "--sffn-selector switch", "this model selects by avgk"),
    ("hash_layer", "--sffn-selector avgk", "this model selects by hash_layer"),
    ("avgk", "--hash-table balanced", "is for the selector hash_layer"),
    ("switch", "--avgk-exclude-bias", "is for the selector avgk"),
    ("hash_layer", "--sffn-gate softmax", "hash_layer gives blocks no score"),
    ("hash_layer", "--sffn-gate sigmoid", "hash_layer gives blocks no score"),
    ("hash_layer", "--balance-loss-weight 0.1", "hash_layer gives blocks no score"),
    ("hash_layer", "--z-loss-weight 0.1", "hash_layer gives blocks no score"),
    ("pkm", "--sffn-value-lr-scale -1", "must be positive"),
    ("avgk", "--sffn-engine grouped --sffn-block-size 2", "cannot multiply blocks of 2 x 16"),
    # Options of fairseq that the layer, or a CPU, does not support
    ("avgk", "--scale-fc", "normalises the hidden units of a dense FFN"),
    ("avgk", "--quant-noise-pq 0.1", "quantization noise does not reach"),
    ("switch", "--quant-noise-scalar 0.1", "quantization noise does not reach"),
    ("hash_layer", "--base-layers 1", "fairseq's BASE layers cannot be mixed"),
    ("dense", "--fp16", "needs a GPU"),
    ("avgk", "--fp16", "needs a GPU"),
    ("switch", "--memory-efficient-fp16", "needs a GPU"),
    ("avgk", "--amp --bf16", "not with --bf16"),
    ("hash_layer", "--amp", "needs a GPU"),
    ("avgk", "--character-embeddings", "share-decoder-input-output-embed"),
    ("avgk", "--adaptive-input --adaptive-input-cutoff 20,40", "share-decoder-input-output"),
    ("avgk", "--decoder-layers-to-keep x", "x"),
]


@pytest.mark.parametrize(("model", "flags", "reason"), TRAINING)
def test_training(
    model: str, flags: str, reason: str, data_bin: Path, runs: Path, tmp_path: Path
) -> None:
    save_dir = shutil.copytree(runs / model, tmp_path / "run")
    line = refused_training(data_bin, save_dir, model, *shlex.split(flags))
    first_flag = flags.split(" --")[0]
    assert line.startswith(first_flag) and reason in line


def test_missing_selector(data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(commands.OF_MODEL, "sffn")
    line = refused_training(data_bin, tmp_path, "sffn")
    assert line == "--sffn-selector: is required by this model, or --sffn-layers"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+model.sffn_block_size=7", "--sffn-block-size 7: does not divide"),
        ("+model.sffn_selector=switch", "--sffn-selector switch: this model selects by avgk"),
        ("+criterion.balance_loss_weight=-1", "--balance-loss-weight -1.0: must not be negative"),
        ("common.fp16=true", "--fp16: needs a GPU"),
    ],
)
def test_training_with_hydra(override: str, expected: str, data_bin: Path, tmp_path: Path) -> None:
    small = ("+model.decoder_embed_dim=16", "task.tokens_per_sample=16", override)
    line = refusal(lambda: commands.hydra_train(data_bin, tmp_path, *small))
    assert line.startswith(expected) and contents(tmp_path) == {}


UNKNOWN = [
    ("sffn", "--sffn-selector nonsense"),
    ("avgk", "--sffn-gate nonsense"),
    ("avgk", "--sffn-engine nonsense"),
    ("hash_layer", "--hash-table nonsense"),
    ("avgk", "--balance-loss-reduce nonsense"),
    ("avgk", "--hash-counts nonsense"),
    ("avgk", "--sffn-block-size 8.5"),
    ("avgk", "--sffn-capacity-factor much"),
]


@pytest.mark.parametrize(("model", "flags"), UNKNOWN)
def test_unknown_values(model: str, flags: str, data_bin: Path, tmp_path: Path) -> None:
    task = "sffn_language_modeling"
    line = refused_training(data_bin, tmp_path, model, *flags.split(), task=task)
    name, value = flags.split()
    assert line.startswith(f"fairseq-train: error: argument {name}: invalid ")
    assert f"'{value}'" in line


@pytest.mark.parametrize(
    "flags", ["--sffn-gate none", "--sffn-selectr avgk", "--hash-table random"]
)
def test_flags_of_other_models(flags: str, data_bin: Path, tmp_path: Path) -> None:
    line = refused_training(data_bin, tmp_path, "dense", *flags.split())
    assert line == f"fairseq-train: error: unrecognized arguments: {flags}"


@pytest.mark.parametrize("folder", ["/proc/nowhere", "FILE", "FILE/below"])
def test_save_directory_that_cannot_be_written(folder: str, data_bin: Path, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("not a folder")
    line = refusal(lambda: commands.train(data_bin, tmp_path / folder, "avgk"))
    assert line.startswith(f"--save-dir {tmp_path / folder}: cannot be written to: ")


def test_script_exits_with_status_1_and_the_line_alone(data_bin: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [
            *(Path(sys.executable).parent / "fairseq-train", data_bin, "--user-dir", USER_DIR),
            *("--task", "language_modeling", "--arch", "transformer_lm_avgk_tiny", "--cpu"),
            *("--optimizer", "adam", "--batch-size", "8", "--save-dir", tmp_path),
            *("--sffn-block-size", "7"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and "Traceback" not in process.stderr + process.stdout
    assert process.stderr.splitlines()[-1].startswith("--sffn-block-size 7: does not divide")
    assert contents(tmp_path) == {}


# Checkpoints

RESUMING = [
    ("dense", "avgk", "", "only the model has decoder.layers.1.fc1.memory.keys"),
    ("avgk", "dense", "", "only the model has decoder.layers.1.fc1.weight"),
    ("avgk", "switch", "", "only the model has decoder.layers.1.fc1.memory.selector.router"),
    ("switch", "hash_layer", "", "only the model has decoder.layers.1.fc1.memory.selector.table"),
    ("hash_layer", "switch", "", "only the model has decoder.layers.1.fc1.memory.selector.router"),
    ("avgk", "avgk", "--decoder-ffn-embed-dim 64", "fc1.weight is [32, 16] in the checkpoint and"),
    ("avgk", "avgk", "--decoder-embed-dim 32", "embed_tokens.weight is [64, 16] in the checkpoint"),
    ("avgk", "avgk", "--decoder-layers 3", "only the model has decoder.layers.2."),
    ("avgk", "avgk", "--sffn-expansion 8", "memory.keys is [512, 16] in the checkpoint and [256,"),
    ("avgk", "avgk", "--sffn-freq 1", "only the model has decoder.layers.0.fc1.memory.keys"),
    ("avgk", "avgk", "--decoder-learned-pos", "only the model has decoder.embed_positions.weight"),
    ("dense", "dense", "--decoder-layers 1", "only the checkpoint has decoder.layers.1."),
    ("switch", "switch", "--sffn-block-size 64 --sffn-active-blocks 1", "block_size is 32 in the"),
    ("avgk", "avgk", "--sffn-block-size 16", "--sffn-block-size"),
    ("hash_layer", "hash_layer", "--sffn-block-size 64 --sffn-active-blocks 1", "block-size"),
    ("hash_layer", "hash_layer", "--sffn-block-size 8 --sffn-active-blocks 1", "block-size"),
]


@pytest.mark.parametrize(("was", "becomes", "flags", "reason"), RESUMING)
def test_checkpoint_of_another_model(
    was: str, becomes: str, flags: str, reason: str, data_bin: Path, runs: Path, tmp_path: Path
) -> None:
    save_dir = shutil.copytree(runs / was, tmp_path / "run")
    line = refused_training(data_bin, save_dir, becomes, *flags.split())
    assert reason in line
    assert line.startswith("the checkpoint does not fit this model: ") and "(see " in line


@pytest.fixture(scope="module")
def larger_dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a corpus like ``data_bin`` with more words."""
    folder = tmp_path_factory.mktemp("larger")
    commands.write_corpus(folder)
    more = "nine more words make a dictionary of another size\n"
    (folder / "train").write_text((folder / "train").read_text() + more)
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", folder / "bin"),
        *("--trainpref", folder / "train", "--validpref", folder / "valid"),
        *("--testpref", folder / "test"),
    )
    return folder / "bin"


def test_checkpoint_of_another_dictionary(
    runs: Path, larger_dictionary: Path, tmp_path: Path
) -> None:
    expected = "embed_tokens.weight is [64, 16] in the checkpoint and [72, 16] in the model"
    save_dir = shutil.copytree(runs / "avgk", tmp_path / "run")
    assert expected in refused_training(larger_dictionary, save_dir, "avgk")
    for command in ("eval-lm", "interactive"):
        assert expected in refused_use(command, larger_dictionary, runs / "avgk/checkpoint_last.pt")


def refused_use(command: str, data: Path, checkpoint: Path, *flags: str) -> str:
    sizes = {"eval-lm": ("--tokens-per-sample", "16"), "generate": ("--sample-break-mode", "eos")}
    flags = ("--task", "language_modeling", *sizes.get(command, ()), *flags)
    return refusal(lambda: commands.apply(command, data, checkpoint, *flags, stdin="the\n"))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_checkpoint(kept: float, data_bin: Path, runs: Path, tmp_path: Path) -> None:
    save_dir = shutil.copytree(runs / "avgk", tmp_path / "run")
    checkpoint = save_dir / "checkpoint_last.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(len(whole) * kept)])
    expected = f"checkpoint {checkpoint}: truncated, or not a checkpoint"
    assert refused_use("eval-lm", data_bin, checkpoint) == expected
    for other in save_dir.glob("checkpoint*.pt"):
        if other != checkpoint:  # training would resume from it
            other.unlink()
    expected += f"; there is no whole checkpoint in --save-dir {save_dir}"
    assert refused_training(data_bin, save_dir, "avgk") == expected


@pytest.mark.parametrize("command", ["eval-lm", "interactive"])
def test_missing_checkpoint(command: str, data_bin: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "nowhere.pt"
    expected = f"checkpoint {checkpoint}: there is no such file"
    assert refused_use(command, data_bin, checkpoint) == expected


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (open, (str(self.witness), "w"))


@pytest.fixture(params=["zip", "zip forced", "legacy forced"])
def malicious(
    request: pytest.FixtureRequest, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Make a checkpoint with code in it, in either file format of PyTorch. Return it and the
    file that the code would make. "forced" tells PyTorch to run such code."""
    if "forced" in request.param:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    state = torch.load(runs / "avgk/checkpoint_last.pt", weights_only=True)
    state["extra_state"]["ema"] = state["model"]
    state["extra_state"]["code"] = Code(tmp_path / "witness")
    (tmp_path / "run").mkdir()
    checkpoint = tmp_path / "run/checkpoint_last.pt"
    torch.save(state, checkpoint, _use_new_zipfile_serialization="zip" in request.param)
    return checkpoint, tmp_path / "witness"


def test_checkpoint_with_code(malicious: tuple[Path, Path], data_bin: Path, tmp_path: Path) -> None:
    checkpoint, witness = malicious
    start = f"checkpoint {checkpoint}: "
    for command in ("eval-lm", "generate", "interactive"):
        assert refused_use(command, data_bin, checkpoint).startswith(start)
    assert refused_training(data_bin, checkpoint.parent, "avgk").startswith(start)
    for flag in ("--restore-file", "--finetune-from-model", "--continue-once"):
        line = refused_training(data_bin, tmp_path / "other", "avgk", flag, str(checkpoint))
        assert line.startswith(start)
    assert not witness.exists()


def test_seed_of_moving_average_with_code(
    malicious: tuple[Path, Path], data_bin: Path, tmp_path: Path
) -> None:
    checkpoint, witness = malicious
    flags = ("--store-ema", "--ema-seed-model", str(checkpoint))
    line = refused_training(data_bin, tmp_path / "other", "avgk", *flags)
    assert line.startswith(f"checkpoint {checkpoint}: ") and not witness.exists()


# Data and evaluation


@pytest.mark.parametrize("arch", ["transformer_lm_avgk_tiny", "transformer_lm_dense"])
@pytest.mark.parametrize("flags", [(), ("--task", "translation")])
def test_a_task_that_is_not_of_language_modeling(
    arch: str, flags: tuple[str, ...], data_bin: Path
) -> None:
    words = ("train", data_bin, "--user-dir", USER_DIR, "--arch", arch, "--cpu", *flags)
    assert refusal(lambda: commands.run(*words)) == (
        f"--task translation: {arch} is a language model; its tasks are language_modeling and "
        "sffn_language_modeling"
    )


@pytest.mark.parametrize("task", ["language_modeling", "sffn_language_modeling"])
@pytest.mark.parametrize("model", ["avgk", "hash_layer"])
def test_token_ids_outside_the_dictionary(
    model: str, task: str, data_bin: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(data_bin, tmp_path / "data")
    words = (data / "dict.txt").read_text().splitlines()
    (data / "dict.txt").write_text("\n".join(words[:-8]) + "\n")
    line = refused_training(data, tmp_path / "run", model, task=task)
    assert line.startswith("token id ") and "outside the dictionary of 56 types" in line


def test_token_ids_outside_the_dictionary_are_found_before_training(
    data_bin: Path, larger_dictionary: Path, tmp_path: Path
) -> None:
    """The task finds them in any split, and for fairseq's model too."""
    data = shutil.copytree(data_bin, tmp_path / "data")
    for kind in ("bin", "idx"):
        shutil.copy(larger_dictionary / f"train.{kind}", data / f"valid.{kind}")
    log = io.StringIO()
    with commands._captured(log):
        line = refused_training(data, tmp_path / "run", "dense", task="sffn_language_modeling")
    assert "in split valid" in line and "outside the dictionary of 64 types" in line
    assert not commands.records(log.getvalue())


EVALUATION = [
    ("--fp16", "--fp16: needs a GPU"),
    ("--bf16", "--bf16: needs a GPU"),
    ("--tokens-per-sample 32 --context-window 16", "--context-window 16: the model has 16 positio"),
    ("--tokens-per-sample 32 --context-window 20", "--context-window 20: the model has 16 positio"),
    ("--context-window 16", "--context-window 16: "),
    ("--context-window 20", "--context-window 20: "),
    ("--model-overrides \"{'sffn_block_size': 7}\"", "--sffn-block-size 7: does not divide"),
    ("--model-overrides \"{'sffn_expansion': 8}\"", "the checkpoint does not fit this model: "),
    (
        "--model-overrides \"{'sffn_selector': 'switch'}\"",
        "--sffn-selector switch: this model sele",
    ),
]


@pytest.mark.parametrize(("flags", "expected"), EVALUATION)
def test_evaluation(flags: str, expected: str, data_bin: Path, runs: Path) -> None:
    checkpoint = runs / "avgk/checkpoint_last.pt"
    assert refused_use("eval-lm", data_bin, checkpoint, *shlex.split(flags)).startswith(expected)


@pytest.mark.parametrize("command", ["generate", "interactive"])
def test_generation_in_half_precision(command: str, data_bin: Path, runs: Path) -> None:
    line = refused_use(command, data_bin, runs / "avgk/checkpoint_last.pt", "--fp16")
    assert line.startswith("--fp16: needs a GPU")


def test_capacity_of_a_model_without_sparse_layers(data_bin: Path, runs: Path) -> None:
    flags = ("--task", "sffn_language_modeling", "--eval-capacity-factor", "1.0")
    line = refused_use("eval-lm", data_bin, runs / "dense/checkpoint_last.pt", *flags)
    assert line == "--eval-capacity-factor 1.0: the model has no sparse layers"


@pytest.mark.parametrize("factor", ["-1.0", "nan"])
def test_capacity_at_evaluation(factor: str, data_bin: Path, runs: Path) -> None:
    flags = ("--task", "sffn_language_modeling", "--eval-capacity-factor", factor)
    line = refused_use("eval-lm", data_bin, runs / "switch/checkpoint_last.pt", *flags)
    assert line.startswith(f"--eval-capacity-factor {factor}: ")


def test_capacity_at_evaluation_in_training(data_bin: Path, tmp_path: Path) -> None:
    task = "sffn_language_modeling"
    line = refused_training(data_bin, tmp_path, "avgk", "--eval-capacity-factor", "-1", task=task)
    assert line.startswith("--eval-capacity-factor -1")
