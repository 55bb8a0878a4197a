"""fairseq's functions called from Python with an ``argparse.Namespace``, as its own tests do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.models import MODEL_REGISTRY
from fairseq_cli import eval_lm, generate, interactive, train, validate
from omegaconf import OmegaConf

from fairseq_sffn.errors import UsageError
from fairseq_sffn.expert_parallel import launch, settings
from fairseq_sffn.options import configuration
from fairseq_sffn.options.configuration import as_configuration, writable
from fairseq_sffn.patches.trainer import SFFNTrainer
from tests import commands

SMALL_STOCK = (*commands.SMALL, "--share-decoder-input-output-embed")
MODELS = {
    "transformer_lm": SMALL_STOCK,  # fairseq's own model
    "transformer_lm_dense_tiny": commands.SMALL,
    "transformer_lm_avgk_tiny": commands.small_flags("avgk"),
    "transformer_lm_gshard_8d_tiny": commands.SMALL,
}


def training_namespace(
    data: Path, folder: Path, arch: str = "transformer_lm_avgk_tiny", *flags: str
) -> argparse.Namespace:
    arguments = (
        *(data, "--task", "language_modeling", "--arch", arch, *MODELS[arch], "--cpu"),
        *("--optimizer", "adam", "--lr", "1e-2", "--tokens-per-sample", "16", "--batch-size", "8"),
        *("--max-update", "2", "--save-dir", folder, "--num-workers", "0"),
        *("--no-progress-bar", *flags),
    )
    return options.parse_args_and_arch(options.get_training_parser(), list(map(str, arguments)))


@pytest.fixture(scope="module")
def checkpoints(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train a checkpoint of each model by calling ``train.main`` with a namespace."""
    result = {}
    for arch in MODELS:
        folder = tmp_path_factory.mktemp(arch)
        args = training_namespace(data_bin, folder, arch)
        commands.capture(lambda args=args: train.main(args))
        result[arch] = folder / "checkpoint_last.pt"
    return result


APPLIED = {
    "eval_lm": (eval_lm, options.get_eval_lm_parser, ("--tokens-per-sample", "16")),
    "generate": (generate, options.get_generation_parser, ("--sample-break-mode", "eos")),
    "interactive": (interactive, options.get_interactive_generation_parser, ("--beam", "2")),
    "validate": (
        validate,
        options.get_validation_parser,
        ("--valid-subset", "valid", "--batch-size", "8"),
    ),
}


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("command", APPLIED)
def test_commands_take_namespaces(
    data_bin: Path, tmp_path: Path, checkpoints: dict[str, Path], command: str, arch: str
) -> None:
    module, parser, flags = APPLIED[command]
    (tmp_path / "lines").write_text("the n1 v2\n")
    if command == "interactive":
        flags = (*flags, "--input", str(tmp_path / "lines"))
    arguments = (
        *(data_bin, "--task", "language_modeling", "--path", checkpoints[arch], "--cpu"),
        *("--num-workers", "0", *flags),
    )
    args = options.parse_args_and_arch(parser(), list(map(str, arguments)))
    assert isinstance(args, argparse.Namespace)
    assert commands.capture(lambda: module.main(args))


@pytest.mark.parametrize("arch", MODELS)
def test_the_trainer_takes_a_namespace(data_bin: Path, tmp_path: Path, arch: str) -> None:
    args = training_namespace(data_bin, tmp_path, arch)
    task = tasks.setup_task(args)
    trainer = SFFNTrainer(args, task, task.build_model(args), task.build_criterion(args))
    assert OmegaConf.is_config(trainer.cfg)
    task.load_dataset("train")
    batches = trainer.get_train_iterator(epoch=1).next_epoch_itr()
    assert trainer.train_step([next(batches)]) is not None


def test_a_namespace_is_converted_once(
    data_bin: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(args: argparse.Namespace) -> Any:
        calls.append(args)
        return convert_namespace_to_omegaconf(args)

    for module in (configuration, eval_lm):
        monkeypatch.setattr(module, "convert_namespace_to_omegaconf", counted)
    arguments = (data_bin, "--path", checkpoints["transformer_lm_avgk_tiny"], "--cpu")
    flags = ("--tokens-per-sample", "16", "--num-workers", "0")
    parser = options.get_eval_lm_parser()
    args = options.parse_args_and_arch(parser, [*map(str, arguments), *flags])
    commands.capture(lambda: eval_lm.main(args))
    assert calls == [args]


REFUSED = {
    "half precision": (("--fp16",), "--fp16: needs a GPU, and this command runs on the CPU"),
    "processes": (
        ("--ddp-backend", "fully_sharded"),
        "--ddp-backend fully_sharded: needs GPUs, and this command runs on CPUs",
    ),
    "option": (("--decoder-layers-to-keep", "1"), "--decoder-layers-to-keep 1: is for a trained"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_what_a_namespace_asks_for_is_checked(
    data_bin: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    args = training_namespace(data_bin, tmp_path, "transformer_lm_avgk_tiny", *flags)
    with pytest.raises(UsageError, match=message):
        commands.capture(lambda: train.main(args))
    task = tasks.setup_task(args)
    model, criterion = task.build_model(args), task.build_criterion(args)
    with pytest.raises(UsageError, match=message):
        SFFNTrainer(args, task, model, criterion)


def test_the_evaluation_of_a_namespace_is_checked(
    data_bin: Path, checkpoints: dict[str, Path]
) -> None:
    arguments = (data_bin, "--path", checkpoints["transformer_lm_avgk_tiny"], "--cpu")
    flags = ("--tokens-per-sample", "16", "--context-window", "16", "--num-workers", "0")
    parser = options.get_eval_lm_parser()
    args = options.parse_args_and_arch(parser, [*map(str, arguments), *flags])
    with pytest.raises(UsageError, match="--context-window 16: leaves nothing of"):
        commands.capture(lambda: eval_lm.main(args))


def test_processes_start_with_a_namespace(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts the processes, which use gloo on CPUs. No process group is started here."""
    for name, value in zip(launch.LAUNCHED, ("localhost", "1", "2", "1", "1"), strict=True):
        monkeypatch.setitem(os.environ, name, value)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        distributed_utils.dist, "init_process_group", lambda **kwargs: asked.update(kwargs)
    )
    monkeypatch.setattr(distributed_utils.torch.distributed, "get_rank", lambda: 1)
    args = training_namespace(data_bin, tmp_path)
    assert args.distributed_backend == "nccl"
    called: list[Any] = []
    distributed_utils.call_main(args, called.append)
    (cfg,) = called
    assert asked["backend"] == "gloo" and asked["init_method"] == "env://"
    assert (asked["world_size"], asked["rank"]) == (2, 1)
    assert cfg.distributed_training.distributed_rank == 1


def test_ranks_of_a_model_without_a_dataclass_differ_by_rank_alone(
    data_bin: Path, tmp_path: Path
) -> None:
    """fairseq keeps the options of such a model, which are all of the command's, in a namespace."""

    def settings_with(*flags: str) -> dict[tuple[str, str], Any]:
        arguments = [str(data_bin), "--task", "language_modeling", "--arch", "fconv_lm", *flags]
        args = options.parse_args_and_arch(options.get_training_parser(), arguments)
        return settings.settings_of(convert_namespace_to_omegaconf(args))

    first = settings_with("--distributed-rank", "0", "--device-id", "0")
    second = settings_with("--distributed-rank", "1", "--device-id", "1")
    assert settings.first_difference([first, second]) is None
    other = settings_with("--decoder-embed-dim", "64")
    assert settings.first_difference([first, other]) == (
        "--decoder-embed-dim is 128 on rank 0 and 64 on rank 1"
    )


BUILT = ("transformer_lm_dense", "transformer_lm_avgk_tiny", "transformer_lm_gshard_8d_tiny")


@pytest.mark.parametrize("name", [*BUILT, "transformer_avgk"])
def test_models_are_built_from_a_namespace(data_bin: Path, tmp_path: Path, name: str) -> None:
    """fairseq's tests build its models like this. An option that the namespace leaves out has the
    model's default."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    model_class = MODEL_REGISTRY[name]
    model_class.add_args(parser)
    sizes = ("--decoder-layers", "2", "--decoder-embed-dim", "64", "--decoder-attention-heads", "4")
    args = parser.parse_args(sizes)
    args.tokens_per_sample, args.max_target_positions = 16, None
    if name == "transformer_avgk":
        args.encoder_embed_dim = 64
    task = tasks.setup_task(training_namespace(data_bin, tmp_path))
    model = model_class.build_model(args, task)
    assert model.decoder.num_layers == 2
    assert model.decoder.embed_tokens.embedding_dim == 64


def test_a_number_of_a_namespace_is_one(data_bin: Path, tmp_path: Path) -> None:
    args = training_namespace(data_bin, tmp_path, "transformer_lm_gshard_8d_tiny")
    args.sffn_block_size = "many"
    with pytest.raises(UsageError, match="--sffn-block-size many: must be a whole number"):
        tasks.setup_task(args).build_model(args)


def test_the_task_takes_a_namespace(data_bin: Path) -> None:
    args = argparse.Namespace(
        task="sffn_language_modeling", data=str(data_bin), tokens_per_sample=16
    )
    task = tasks.setup_task(args)
    assert task.token_counts() == task.dictionary.count
    task.args.eval_capacity_factor = 2.0
    flags = ("--sffn-eval-capacity-factor", "1")
    args = training_namespace(data_bin, data_bin, "transformer_lm_avgk_tiny", *flags)
    model = task.build_model(args, from_checkpoint=True)
    assert model.memory_configs["layer1"].eval_capacity_factor == 2.0


def test_a_callers_own_dataset_is_evaluated(data_bin: Path, tmp_path: Path) -> None:
    """The arguments are positional, and the dataset is no split of the task."""
    args = training_namespace(data_bin, tmp_path)
    task = tasks.setup_task(args)
    task.load_dataset("valid")
    own = task.datasets.pop("valid")

    def evaluated(max_positions: int) -> int:
        task.dataset_to_epoch_iter.clear()
        batches = task.eval_lm_dataloader(own, 64, 4, max_positions)
        return sum(batch["nsentences"] for batch in batches)

    assert evaluated(8) == 1  # fairseq leaves out samples that are too long
    assert evaluated(16) == len(own)


def test_batches_take_an_epoch_by_position(data_bin: Path, tmp_path: Path) -> None:
    """They are dealt as in the first epoch, which is kept for later epochs."""
    iterators = []
    for epoch in (1, 3):
        task = tasks.setup_task(training_namespace(data_bin, tmp_path))
        task.load_dataset("train")
        dataset = task.dataset("train")
        iterators.append(task.get_batch_iterator(dataset, 64, 4, 16, False, 1, 1, 1, 0, 0, epoch))
    first, third = iterators
    assert (first.epoch, third.epoch) == (1, 3)
    assert [list(batch) for batch in third.frozen_batches] == [
        list(batch) for batch in first.frozen_batches
    ]


def test_what_is_no_namespace_stays() -> None:
    config = OmegaConf.create({"common": {"cpu": True}})
    assert as_configuration(config) is config
    with writable(argparse.Namespace()) as options:
        assert options is None
