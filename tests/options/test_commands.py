"""Options out of their range stop every command with one line, before any work."""

import argparse
import inspect
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from fairseq import models
from fairseq import options as fairseq_options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.registry import REGISTRIES
from fairseq_cli import eval_lm, train

from fairseq_sffn.errors import UsageError, flag
from fairseq_sffn.options.checks import check_ranges
from fairseq_sffn.options.ranges import LARGEST, RANGES
from tests import commands
from tests.commands import USER_DIR, refusal
from tests.models.small_lm import language_modeling, small_config

SCHEDULERS = {
    "triangular": ("--max-lr", "2"),
    "tri_stage": ("--decay-steps", "2"),
}
"""Learning-rate scheduler -> flags that it requires."""


def training_options(*flags: str) -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser of fairseq-train, and the configuration that it makes."""
    parser = fairseq_options.get_training_parser("language_modeling")
    required = ("--task", "language_modeling", "--arch", "transformer_lm_avgk_tiny")
    required += ("--criterion", "sffn_cross_entropy", "--lr", "1", "--batch-size", "8")
    arguments = ["data", "--user-dir", USER_DIR, *required, "--max-update", "9", *flags]
    args = fairseq_options.parse_args_and_arch(parser, arguments)
    return parser, convert_namespace_to_omegaconf(args)


CHOICES = {
    "": (),
    **{name: ("--optimizer", name) for name in ("adam", "sffn_adam", "sgd", "nag", "adafactor")},
    **{name: ("--optimizer", name) for name in ("adagrad", "adadelta", "adamax")},
    **{
        name: ("--lr-scheduler", name, *SCHEDULERS.get(name, ()))
        for name in REGISTRIES["lr_scheduler"]["registry"]
        if name not in ("manual", "pass_through")
    },
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_numeric_flag_of_training(choice: str) -> None:
    """Defaults pass. NaN, infinity and integers that are too large for any machine never pass."""
    parser, cfg = training_options(*CHOICES[choice])
    check_ranges(cfg)
    groups = [name for name in RANGES if " " not in name]
    known = {name for group in groups for name in RANGES[group]}
    for action in parser._actions:
        if action.type not in (int, float) or not action.option_strings:
            continue
        name = action.dest
        if name not in known:
            assert name in NOT_IN_THE_TABLE, name
            continue
        group = next(g for g in groups if name in RANGES[g] and name in (cfg[g] or ()))
        wrong = [LARGEST + 1] if action.type is int else [math.nan, math.inf]
        if choice and group not in ("optimizer", "lr_scheduler"):
            continue  # the same for all choices
        before = getattr(cfg[group], name)
        for value in wrong:
            setattr(cfg[group], name, value)
            with pytest.raises(UsageError, match=rf"^{flag(name)} "):
                check_ranges(cfg)
        setattr(cfg[group], name, before)


NOT_IN_THE_TABLE = {
    # The memory of a sparse layer or the criterion checks these, as they are also used without
    # fairseq's commands.
    *("sffn_expansion", "sffn_block_size", "sffn_active_blocks", "sffn_shared_blocks"),
    *("sffn_freq", "sffn_glu_width"),
    *("sffn_capacity_factor", "sffn_eval_capacity_factor", "sffn_init_scale"),
    *("sffn_value_lr_scale", "sffn_route_scale", "sffn_expert_parallel"),
    *(
        "sffn_balance_rate",
        "avgk_balance_rate",
        "avgk_key_ema",
        "sigma_moe_expert_dropout",
        "lorkm_rank",
        "aoe_rank",
        "pkm_query_dim",
        "pkm_heads",
        "pkm_ffn_query_dim",
    ),
    *("balance_loss_weight", "z_loss_weight"),
    # --scoring bleu has ids of special types, which no training reads.
    *("pad", "eos", "unk"),
}


TRAINING = [
    ("--dropout 1.5", "must be at least 0 and below 1"),
    ("--dropout nan", "must be at least 0 and below 1"),
    ("--dropout -1", "must be at least 0 and below 1"),
    ("--tokens-per-sample 0", "must be at least 1"),
    ("--update-freq 0", "must be one or more numbers, each at least 1"),
    ("--update-freq 1,0", "must be one or more numbers, each at least 1"),
    ("--log-interval 0", "must be at least 1"),
    ("--seed -1", "must be at least 0 and at most 4000000000"),
    ("--max-tokens -1", "must be at least 1"),
    ("--lr ''", "must be one or more numbers, each at least 0 and finite"),
    ("--lr -1", "must be one or more numbers, each at least 0 and finite"),
    ("--lr 1e-3,1e999", "must be one or more numbers, each at least 0 and finite"),
    ("--batch-size -3", "must be at least 1"),
    ("--clip-norm nan", "must be at least 0 and finite"),
    ("--adam-eps -1", "must be positive and finite"),
    ("--adam-betas '(0.9, 1.0)'", "must be two numbers, each at least 0 and below 1"),
    ("--adam-betas 0.9", "must be two numbers, each at least 0 and below 1"),
    ("--warmup-updates -5", "must be at least 0"),
    ("--decoder-layers 0", "must be at least 1"),
    ("--decoder-ffn-embed-dim -32", "must be at least 1"),
    ("--keep-interval-updates-pattern 0", "must be at least 1, or -1 (off)"),
    ("--max-update 99999999999999999999", f"at most {LARGEST}"),
    # Two options
    ("--decoder-attention-heads 3", "must divide --decoder-embed-dim 16"),
    ("--decoder-embed-dim 2", "is too narrow for sinusoidal positions"),
    ("--shard-id 1", "must be below --num-shards 1"),
    ("--distributed-rank 1", "must be below --distributed-world-size 1"),
    ("--lr 1,2 --lr-scheduler inverse_sqrt", "inverse_sqrt takes one learning rate"),
    ("--warmup-updates 0 --lr-scheduler inverse_sqrt", "must be at least 1"),
    ("--total-num-update 0 --lr-scheduler polynomial_decay", "it is --max-update unless set"),
    ("--max-update -1 --lr-scheduler polynomial_decay", "must be at least 0"),
    ("--max-lr 0.001 --lr-scheduler triangular", "must be above --lr 0.01"),
    ("--min-lr 1 --lr-scheduler step", "must be below --lr 0.01"),
    ("--decay-steps 0 --lr-scheduler tri_stage", "must be at least 1, or set --phase-ratio"),
    ("--phase-ratio 0.5,0.4,0.2 --lr-scheduler tri_stage", "must add up to 1"),
    ("--lr-shrink 1 --lr-scheduler reduce_lr_on_plateau", "must be positive and below 1"),
    ("--model-parallel-size 2", "needs Megatron-LM"),
    # Options of the data
    ("--adaptive-softmax-cutoff 20,10 --no-share-decoder-input-output-embed", "must rise"),
    ("--adaptive-softmax-cutoff 20,x --no-share-decoder-input-output-embed", "each at least 1"),
    ("--adaptive-softmax-cutoff 20,999 --no-share-decoder-input-output-embed", "is beyond the"),
    ("--valid-subset nosuch", "there is no split nosuch in"),
    ("--valid-subset valid,nosuch", "there is no split nosuch in"),
    ("--valid-subset ''", "there is no split '' in"),
    ("--train-subset nosuch", "there is no split nosuch in"),
]


@pytest.mark.parametrize(("flags", "reason"), TRAINING)
def test_training(flags: str, reason: str, data_bin: Path, tmp_path: Path) -> None:
    given = shlex.split(flags)
    line = refusal(lambda: commands.train(data_bin, tmp_path, "avgk", *given))
    assert line.startswith(f"{given[0]} ") and reason in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--lr 1..2", "--update-freq 1.5", "--update-freq 1e999"])
def test_lists_that_are_not_of_numbers(flags: str, data_bin: Path, tmp_path: Path) -> None:
    name, value = flags.split()
    line = refusal(lambda: commands.train(data_bin, tmp_path, "avgk", name, value))
    assert line.startswith(f"fairseq-train: error: argument {name}: invalid") and value in line


def test_batches_without_a_size(data_bin: Path, tmp_path: Path) -> None:
    arguments = ("train", data_bin, "--user-dir", USER_DIR, "--task", "language_modeling")
    arguments += ("--arch", "transformer_lm_dense_tiny", "--save-dir", tmp_path)
    line = refusal(lambda: commands.run(*arguments))
    assert line == "--max-tokens or --batch-size: one of them is required"


def test_samples_that_are_all_too_long(data_bin: Path, tmp_path: Path) -> None:
    line = refusal(lambda: commands.train(data_bin, tmp_path, "avgk", "--max-tokens", "3"))
    assert line.startswith("every sample of the data is longer than --max-tokens 3 or the model's ")
    assert not list(tmp_path.iterdir())


def test_data_that_is_not_there(tmp_path: Path) -> None:
    line = refusal(lambda: commands.train(tmp_path / "nowhere", tmp_path / "saved", "avgk"))
    assert line == f"data {tmp_path / 'nowhere'}: there is no such folder"


SPECIAL = [
    "--patience -1 --keep-last-epochs -1 --keep-best-checkpoints -1 --keep-interval-updates -1",
    "--patience 0 --keep-last-epochs 0 --keep-best-checkpoints 0 --keep-interval-updates 0",
    "--max-epoch 1 --max-update 0 --stop-min-lr -1 --heartbeat-timeout -1 --distributed-port -1",
    "--clip-norm 0 --save-interval-updates 0 --validate-interval-updates 0 --num-workers 0",
    "--warmup-init-lr -1 --lr-scheduler cosine --lr-period-updates -1",
    "--lr-scheduler polynomial_decay --power 2",
    "--lr 1e-3,1e-4 --update-freq 1,2 --adam-betas 0.9,0.98",
    "--seed 0 --curriculum 0 --weight-decay 0 --output-dictionary-size -1 --data-buffer-size 0",
]


@pytest.mark.parametrize("flags", SPECIAL)
def test_special_values_go_on_working(flags: str, data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "dense", "--max-update", "2", *shlex.split(flags))
    assert commands.losses(log)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("+model.dropout=1.5", "--dropout 1.5: must be at least 0 and below 1"),
        ("optimization.lr=[]", "--lr '': must be one or more numbers"),
        ("dataset.batch_size=-3", "--batch-size -3: must be at least 1"),
        ("dataset.valid_subset=nosuch", "--valid-subset nosuch: there is no split nosuch"),
    ],
)
def test_training_with_hydra(override: str, line: str, data_bin: Path, tmp_path: Path) -> None:
    stopped = refusal(lambda: commands.hydra_train(data_bin, tmp_path, override))
    assert stopped.startswith(line) and not list(tmp_path.iterdir())


def test_hydra_imports_the_plugin_in_the_midst_of_training() -> None:
    """``fairseq-hydra-train`` has imported ``train.main`` before the plugin, which can therefore
    only change the functions that ``train.main`` looks up."""
    assert "add_defaults" in inspect.unwrap(train.main).__globals__
    _, cfg = training_options()
    cfg.optimization.clip_norm = -1.0
    with pytest.raises(UsageError, match=r"^--clip-norm -1\.0: "):
        train.add_defaults(cfg)


@pytest.mark.parametrize(
    ("option", "value"), [("distributed_world_size", 0), ("distributed_port", -2)]
)
def test_no_process_is_started_by_numbers_out_of_range(option: str, value: int) -> None:
    _, cfg = training_options()
    cfg.distributed_training[option] = value
    with pytest.raises(UsageError, match=rf"^{flag(option)} {value}: must be at least "):
        distributed_utils.call_main(cfg, lambda cfg: None)


@pytest.fixture(scope="module")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    commands.train(data_bin, folder, "avgk", "--max-update", "1")
    return folder / "checkpoint_last.pt"


APPLIED = [
    ("eval-lm", "--tokens-per-sample 0", "must be at least 1"),
    ("eval-lm", "--context-window -1", "must be at least 0"),
    ("eval-lm", "--softmax-batch 0", "must be at least 1"),
    ("eval-lm", "--batch-size 0", "must be at least 1"),
    ("eval-lm", "--gen-subset nosuch", "there is no split nosuch in"),
    ("validate", "--batch-size -1", "must be at least 1"),
    ("validate", "--valid-subset nosuch --batch-size 8", "there is no split nosuch in"),
    ("generate", "--beam 0", "must be at least 1"),
    ("generate", "--temperature 0", "must be positive and finite"),
    ("generate", "--lenpen nan", "must be finite"),
    ("generate", "--sampling-topp 1.5 --sampling", "must be positive and at most 1, or -1 (off)"),
    ("generate", "--sampling-topk 5", "needs --sampling"),
    ("generate", "--nbest 1 --beam 2 --sampling", "must equal --beam 2 with --sampling"),
    ("generate", "--diverse-beam-groups 2 --beam 3", "must divide --beam 3"),
    ("generate", "--gen-subset nosuch", "there is no split nosuch in"),
    ("interactive", "--beam -1", "must be at least 1"),
    ("interactive", "--batch-size 2 --buffer-size 1", "must be at most --buffer-size 1"),
    ("interactive", "--max-len-b -1", "must be at least 0"),
]


@pytest.mark.parametrize(("command", "flags", "reason"), APPLIED)
def test_other_commands(
    command: str, flags: str, reason: str, data_bin: Path, trained: Path
) -> None:
    given = ("--task", "language_modeling", *shlex.split(flags))
    line = refusal(lambda: commands.apply(command, data_bin, trained, *given, stdin="the n1\n"))
    assert line.startswith(f"{given[2]} ") and reason in line


def test_searches_that_exclude_each_other(data_bin: Path, trained: Path) -> None:
    flags = ("--task", "language_modeling", "--diverse-beam-groups", "1", "--match-source-len")
    line = refusal(lambda: commands.apply("generate", data_bin, trained, *flags))
    assert (
        line == "--diverse-beam-groups and --match-source-len: are different searches; choose one"
    )


def test_python_callers_may_give_a_namespace(data_bin: Path, trained: Path) -> None:
    parser = fairseq_options.get_eval_lm_parser()
    arguments = [str(data_bin), "--user-dir", USER_DIR, "--path", str(trained), "--cpu"]
    args = fairseq_options.parse_args_and_arch(parser, [*arguments, "--batch-size", "-1"])
    assert refusal(lambda: eval_lm.main(args)) == "--batch-size -1: must be at least 1"


def test_options_that_replace_those_of_a_checkpoint(data_bin: Path, trained: Path) -> None:
    flags = ("--model-overrides", "{'dropout': 1.5}")
    line = refusal(lambda: commands.apply("eval-lm", data_bin, trained, *flags))
    assert line == "--dropout 1.5: must be at least 0 and below 1"


def test_models_that_are_built_in_python() -> None:
    config = small_config("dense", decoder_attention_heads=3)
    with pytest.raises(UsageError, match=r"^--decoder-attention-heads 3: must divide"):
        models.build_model(config, language_modeling())


@pytest.mark.parametrize("arch", ["transformer_lm", "transformer_lm_gpt2_tiny", "transformer_tiny"])
def test_models_of_fairseq(arch: str, data_bin: Path, tmp_path: Path) -> None:
    flags = ("--arch", arch, "--criterion", "cross_entropy", "--attention-dropout", "1")
    if arch == "transformer_tiny":
        flags += ("--task", "translation")
    line = refusal(lambda: fairseq_training(data_bin, tmp_path, *flags))
    assert line == "--attention-dropout 1.0: must be at least 0 and below 1"


def fairseq_training(data: Path, save_dir: Path, *flags: str) -> str:
    """Train without flags of the plugin's models."""
    return commands.run(
        *("train", data, "--user-dir", USER_DIR, "--task", "language_modeling", "--cpu"),
        *("--save-dir", save_dir, "--batch-size", "8", "--max-update", "1", *flags),
    )
