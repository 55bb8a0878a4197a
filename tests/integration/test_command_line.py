"""Every model with fairseq's commands: train, evaluate, generate, in process and as scripts."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf, open_dict

from fairseq_sffn.memory.selectors.hash_layer import balanced_table
from tests import commands
from tests.commands import ROOT, USER_DIR, losses, override, records

MODELS = (*commands.MODELS, "sffn")
SPARSE = ("avgk", "switch", "hash_layer")
EVERY_SAMPLE = ("--required-batch-size-multiple", "1")
"""Flags without which fairseq-train leaves out a last batch whose size is no multiple of 8."""
SENTENCES = ("--task", "language_modeling", "--sample-break-mode", "eos")


def logged(log: str, *names: str) -> list[tuple[str, ...]]:
    """Return the values that were logged under these names at each update."""
    return [tuple(record[name] for name in names) for record in records(log)]


def last_checkpoint(save_dir: Path) -> dict[str, Any]:
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


def valid_ppl(log: str) -> float:
    return float(records(log, "valid")[-1]["valid_ppl"])


# Each command, on each model


@dataclass
class Trained:
    model: str
    log: str
    checkpoint: Path


@pytest.fixture(scope="module", params=MODELS)
def trained(
    request: pytest.FixtureRequest, data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    save_dir = tmp_path_factory.mktemp(request.param)
    flags = (*EVERY_SAMPLE, "--validate-interval-updates", "3")
    log = commands.train(data_bin, save_dir, request.param, *flags)
    return Trained(request.param, log, save_dir / "checkpoint_last.pt")


def hypotheses(output: str) -> dict[str, tuple[str, list[float]]]:
    """Return sample -> text and scores (base 2) of its tokens, as generation printed them."""
    texts = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", output, re.M))
    scores = dict(re.findall(r"^P-(\d+)\t(.*)$", output, re.M))
    return {n: (texts[n], [float(score) for score in scores[n].split()]) for n in texts}


def test_training_learns(trained: Trained) -> None:
    first, *_, last = losses(trained.log).values()
    assert float(last) < float(first) - 0.5


def test_eval_lm_finds_the_perplexity_that_training_logged(
    trained: Trained, data_bin: Path
) -> None:
    found = commands.evaluate(data_bin, trained.checkpoint)
    assert found == pytest.approx(valid_ppl(trained.log), abs=0.01)


def test_generation_scores_sentences_as_eval_lm_does(trained: Trained, data_bin: Path) -> None:
    """Generation decodes token by token. It is made to repeat the sentences of the split."""
    evaluated = commands.evaluate(data_bin, trained.checkpoint, *SENTENCES)
    output = commands.apply(
        *("generate", data_bin, trained.checkpoint, *SENTENCES, "--gen-subset", "valid"),
        *("--batch-size", "16", "--beam", "2", "--max-len-b", "8"),
    )
    scores = [score for _, scores in hypotheses(output).values() for score in scores]
    assert len(scores) == 40 * 9
    assert 2 ** (-sum(scores) / len(scores)) == pytest.approx(evaluated, abs=0.01)


def test_interactive_continues_each_prompt(trained: Trained, data_bin: Path) -> None:
    output = commands.apply(
        *("interactive", data_bin, trained.checkpoint, "--task", "language_modeling"),
        *("--max-len-b", "12"),
        stdin="the n2 v3 the n4\nthe n1\nthe n2 v3 the n4\n",
    )
    long, short, again = hypotheses(output).values()
    assert short[0].startswith("the n1 ") and long[0].startswith("the n2 v3 the n4 ")
    # Text and scores do not depend on earlier prompts.
    assert again == long


# Logs


@pytest.mark.parametrize("model", commands.MODELS)
def test_losses_are_those_of_cross_entropy(model: str, data_bin: Path, tmp_path: Path) -> None:
    ours = commands.train(data_bin, tmp_path / "ours", model, "--balance-loss-weight", "0")
    plain = commands.train(data_bin, tmp_path / "plain", model, "--criterion", "cross_entropy")
    keys = ("num_updates", "loss", "ppl", "gnorm", "wpb", "bsz")
    assert logged(ours, *keys) == logged(plain, *keys)
    assert valid_ppl(ours) == valid_ppl(plain)


@pytest.mark.parametrize("flag", ["--balance-loss-weight", "--z-loss-weight"])
def test_extra_losses_train_but_stay_out_of_the_logged_loss(
    flag: str, data_bin: Path, tmp_path: Path
) -> None:
    without, with_extra = (
        losses(commands.train(data_bin, tmp_path / weight, "switch", flag, weight))
        for weight in ("0", "1")
    )
    assert with_extra[1] == without[1] and with_extra[6] != without[6]


def test_mean_over_two_layers_is_half_their_sum(data_bin: Path, tmp_path: Path) -> None:
    flags = ("--sffn-freq", "1", "--balance-loss-reduce")
    total = ("sum", "--balance-loss-weight", "1")
    mean = ("mean", "--balance-loss-weight", "2")
    logs = [
        commands.train(data_bin, tmp_path / reduce[0], "switch", *flags, *reduce)
        for reduce in (total, mean)
    ]
    assert logged(logs[0], "loss", "gnorm") == logged(logs[1], "loss", "gnorm")


METRICS = ("balance_loss", "load_entropy", "load_max", "unused_blocks", "dropped_share")


def test_json_log_has_every_layer(data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "switch", "--sffn-freq", "1")
    for record in (records(log)[-1], records(log, "valid")[-1], records(log, "train")[-1]):
        plain = {name.removeprefix("valid_").removeprefix("train_") for name in record}
        assert {f"{m}{layer}" for m in METRICS for layer in ("", "_layer0", "_layer1")} <= plain


@pytest.mark.parametrize("log_format", ["simple", "none"])
def test_other_logs_have_means_only(log_format: str, data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "switch", "--log-format", log_format)
    assert all(metric in log for metric in METRICS) or log_format == "none"
    assert "_layer1" not in log


def test_tensorboard_has_every_layer(data_bin: Path, tmp_path: Path) -> None:
    board = ("--tensorboard-logdir", tmp_path / "board", "--log-format", "simple")
    commands.train(data_bin, tmp_path / "ckpt", "switch", *board)
    for split in ("train", "train_inner", "valid"):
        (events,) = (tmp_path / "board" / split).iterdir()
        assert all(f"{metric}_layer1".encode() in events.read_bytes() for metric in METRICS)


def test_dropped_tokens_are_logged(data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "switch", "--sffn-capacity-factor", "1.0")
    assert all(0 < float(record["dropped_share"]) < 1 for record in records(log))
    assert records(log, "valid")[-1]["valid_dropped_share"] == "0"


def test_divergence_is_reported_as_fairseq_does(data_bin: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        commands.train(data_bin, tmp_path, "avgk", "--lr", "1e20", "--max-update", "10")


# Options

ADAPTIVE = (
    *("--adaptive-input", "--adaptive-input-cutoff", "20,40", "--tie-adaptive-weights"),
    *("--adaptive-softmax-cutoff", "20,40", "--no-share-decoder-input-output-embed"),
)
CHARACTERS = (
    *("--character-embeddings", "--character-filters", "[(1, 8), (2, 8)]"),
    "--no-share-decoder-input-output-embed",
)
EVERYTHING = (
    *("--checkpoint-activations", "--activation-dropout", "0.1", "--decoder-layerdrop", "0.2"),
    *("--sffn-capacity-factor", "1.5", "--sffn-freq", "1", "--update-freq", "2"),
    *("--clip-norm", "0.1", "--sample-break-mode", "complete"),
)
EXTRA_LOSSES = (
    *("--z-loss-weight", "0.01", "--balance-loss-weight", "0.1", "--balance-loss-reduce", "mean"),
)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("avgk", (*EVERYTHING, *EXTRA_LOSSES)),
        ("switch", (*EVERYTHING, *EXTRA_LOSSES)),
        ("hash_layer", (*EVERYTHING, *CHARACTERS)),
        ("sffn", (*EVERYTHING, *EXTRA_LOSSES, *CHARACTERS)),
        ("switch", ("--offload-activations", "--decoder-layerdrop", "0.5")),
        ("avgk", ("--activation-dropout", "0.2", "--activation-fn", "gelu")),
        ("avgk", ("--sffn-active-blocks", "1", "--sffn-block-size", "1", "--avgk-exclude-bias")),
        ("switch", ("--sffn-active-blocks", "2", "--sffn-block-size", "16", "--sffn-init-scale=2")),
        ("hash_layer", ("--hash-table", "balanced", "--no-share-decoder-input-output-embed")),
        ("switch", ("--decoder-learned-pos", "--no-decoder-normalize-before")),
        ("avgk", ("--sffn-capacity-factor", "1.0", "--sffn-engine", "loop")),
    ],
)
def test_options_in_combination(
    model: str, flags: tuple[str, ...], data_bin: Path, tmp_path: Path
) -> None:
    log = commands.train(data_bin, tmp_path, model, *EVERY_SAMPLE, *flags)
    assert len(losses(log)) == 6 and all(math.isfinite(float(x)) for x in losses(log).values())
    break_mode = "complete" if "--sample-break-mode" in flags else "none"
    found = commands.evaluate(
        data_bin, tmp_path / "checkpoint_last.pt", "--sample-break-mode", break_mode
    )
    assert found == pytest.approx(valid_ppl(log), abs=0.01)


@pytest.mark.parametrize("model", ["dense", *SPARSE])
def test_adaptive_embeddings(model: str, data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, model, *ADAPTIVE)
    assert float(losses(log)[6]) < float(losses(log)[1]) - 0.5
    state = last_checkpoint(tmp_path)["model"]
    tied = "decoder.adaptive_softmax.head.word_proj.weight", "decoder.embed_tokens.embeddings.0.0"
    assert torch.equal(state[tied[0]], state[f"{tied[1]}.weight"])
    output = commands.apply(
        *("interactive", data_bin, tmp_path / "checkpoint_last.pt"),
        *("--task", "language_modeling", "--max-len-b", "6"),
        stdin="the n1\n",
    )
    assert hypotheses(output)["0"][0].startswith("the n1 ")


def test_adaptive_softmax_loss_counts_every_token(data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "avgk", *EVERY_SAMPLE, *ADAPTIVE)
    found = commands.evaluate(data_bin, tmp_path / "checkpoint_last.pt")
    assert found == pytest.approx(valid_ppl(log), abs=0.01)


@pytest.mark.parametrize("model", SPARSE)
def test_activation_checkpoints_change_nothing(model: str, data_bin: Path, tmp_path: Path) -> None:
    """Balance and z losses make the comparison include the router's gradients. Dropout is on."""
    scores = model != "hash_layer"
    extra = ("--balance-loss-weight", "0.5", "--z-loss-weight", "0.1") if scores else ()
    keys = ("loss", "gnorm", "load_max_layer1", *(("balance_loss",) if scores else ()))
    plain = commands.train(data_bin, tmp_path / "plain", model, *extra)
    expected = last_checkpoint(tmp_path / "plain")["model"]
    for flag in ("--checkpoint-activations", "--offload-activations"):
        saving = commands.train(data_bin, tmp_path / flag, model, *extra, flag)
        assert logged(saving, *keys) == logged(plain, *keys)
        torch.testing.assert_close(last_checkpoint(tmp_path / flag)["model"], expected)


def test_every_gate_trains_differently(data_bin: Path, tmp_path: Path) -> None:
    last = set()
    for gate in ("none", "softmax", "renormalized", "sigmoid"):
        log = commands.train(data_bin, tmp_path / gate, "avgk", *EVERY_SAMPLE, "--sffn-gate", gate)
        found = commands.evaluate(data_bin, tmp_path / gate / "checkpoint_last.pt")
        assert found == pytest.approx(valid_ppl(log), abs=0.01)
        last.add(losses(log)[6])
    assert len(last) == 4


def test_activation_dropout_is_off_in_evaluation(data_bin: Path, tmp_path: Path) -> None:
    """At a learning rate of 0 the model stays the same, whatever dropout does."""
    flags = ("--lr", "0", "--dropout", "0", "--activation-dropout")
    without, dropping = (
        commands.train(data_bin, tmp_path / p, "avgk", *flags, p) for p in ("0", "0.5")
    )
    assert losses(without)[1] != losses(dropping)[1]
    assert valid_ppl(without) == valid_ppl(dropping)


@pytest.mark.parametrize("model", SPARSE)
def test_ema_is_stored(model: str, data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, model, "--store-ema", "--ema-decay", "0.5")
    state = last_checkpoint(tmp_path)
    name = "decoder.layers.1.fc1.memory.values"
    average = state["extra_state"]["ema"][name]
    assert average.shape == state["model"][name].shape
    assert not torch.equal(average, state["model"][name])


def test_ema_has_every_parameter(data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, "avgk", "--store-ema", "--max-update", "1")
    state = last_checkpoint(tmp_path)
    assert set(state["extra_state"]["ema"]) == set(state["model"])


def test_hash_counts_of_the_training_split_spread_it_better(data_bin: Path, tmp_path: Path) -> None:
    """The dictionary does not know how often a sentence ends. The training split does."""
    loads = {}
    for counts in ("dictionary", "train"):
        flags = ("--task", "sffn_language_modeling", "--hash-table", "balanced")
        log = commands.train(
            *(data_bin, tmp_path / counts, "hash_layer", *flags, "--hash-counts", counts),
            *("--max-update", "28"),
        )
        loads[counts] = float(records(log, "train")[-1]["train_load_entropy"])
    assert loads["train"] > loads["dictionary"] + 0.01


@pytest.mark.parametrize("command", ["train", "hydra-train"])
@pytest.mark.parametrize("subset", ["train", "valid"])
def test_hash_counts_are_of_the_split_that_trains(command, subset, data_bin, tmp_path) -> None:
    if command == "train":
        flags = ("--task", "sffn_language_modeling", "--hash-table", "balanced", "--max-update")
        commands.train(
            *(data_bin, tmp_path, "hash_layer", *flags, "1", "--hash-counts", "train"),
            *("--train-subset", subset, "--disable-validation"),
        )
    else:
        commands.hydra_train(
            *(data_bin, tmp_path, "model._name=transformer_lm_hash_layer_tiny"),
            *("+model.decoder_layers=2", "+model.decoder_embed_dim=16", "dataset.num_workers=0"),
            *("+model.decoder_ffn_embed_dim=32", "+model.decoder_attention_heads=2"),
            *("+model.hash_table=balanced", "+task.hash_counts=train", "optimization.max_update=1"),
            *(f"dataset.train_subset={subset}", "dataset.disable_validation=true"),
            "task.tokens_per_sample=16",
        )
    state = last_checkpoint(tmp_path)
    assert state["cfg"]["task"]["train_subset"] == subset
    text = data_utils.load_indexed_dataset(str(data_bin / subset), None)
    types = len(Dictionary.load(str(data_bin / "dict.txt")))
    counts = torch.cat([text[i] for i in range(len(text))]).long().bincount(minlength=types)
    table = state["model"]["decoder.layers.1.fc1.memory.selector.table"]
    assert table.flatten().tolist() == balanced_table(counts.tolist(), 16).flatten().tolist()

    # Loading counts nothing. It needs neither the split nor an option of an earlier version.
    held_out = shutil.copytree(data_bin, tmp_path / "bin")
    for split in {"train", subset} - {"test"}:
        (held_out / f"{split}.idx").unlink()
    del state["cfg"]["task"]["train_subset"]
    torch.save(state, tmp_path / "earlier.pt")
    found = {
        commands.evaluate(held_out, tmp_path / name, "--task", task, "--gen-subset", "test")
        for name in ("checkpoint_last.pt", "earlier.pt")
        for task in ("language_modeling", "sffn_language_modeling")
    }
    assert len(found) == 1


def test_capacity_at_evaluation(data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, "switch")
    checkpoint = tmp_path / "checkpoint_last.pt"
    by_task = commands.evaluate(
        *(data_bin, checkpoint, "--task", "sffn_language_modeling"),
        *("--eval-capacity-factor", "1.0"),
    )
    overridden = "{'sffn_eval_capacity_factor': 1.0}"
    assert by_task == commands.evaluate(data_bin, checkpoint, "--model-overrides", overridden)
    assert by_task != commands.evaluate(data_bin, checkpoint)


def test_layers_kept_at_evaluation_are_as_they_were_trained(data_bin: Path, tmp_path: Path) -> None:
    commands.train(
        *(data_bin, tmp_path, "switch", *EVERY_SAMPLE),
        *("--decoder-layers", "4", "--decoder-layerdrop", "0.2"),
    )
    checkpoint = tmp_path / "checkpoint_last.pt"
    full = commands.evaluate(data_bin, checkpoint)
    keep = {"decoder_layers_to_keep": "1,2"}
    assert commands.evaluate(data_bin, checkpoint, "--model-overrides", str(keep)) != full

    trained_as = torch.load(checkpoint, weights_only=True)["model"]
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], {**keep, "data": str(data_bin)}
    )
    kept = model.state_dict()
    for name, tensor in kept.items():
        name = name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1.")
        torch.testing.assert_close(tensor, trained_as[name], rtol=0, atol=0)
    assert "decoder.layers.0.fc1.memory.keys" in kept and "decoder.layers.1.fc1.weight" in kept
    _, extra = model.eval()(torch.tensor([[4, 5, 6]]))
    assert list(extra["routing"]) == ["layer1"]


def test_layers_kept_in_any_order(data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, "switch", "--decoder-layers", "4", "--max-update", "2")
    sorted_order, other_order = (
        commands.evaluate(
            *(data_bin, tmp_path / "checkpoint_last.pt", "--model-overrides"),
            str({"decoder_layers_to_keep": keep}),
        )
        for keep in ("1,2", "2,1")
    )
    assert sorted_order == other_order


def test_validation_split_of_few_samples(data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "avgk", "--tokens-per-sample", "64")
    assert len(losses(log)) == 6 and valid_ppl(log) > 1


def test_smaller_output_dictionary(data_bin: Path, tmp_path: Path) -> None:
    log = commands.train(data_bin, tmp_path, "avgk", "--output-dictionary-size", "20")
    assert len(losses(log)) == 6


# --arch and fairseq-hydra-train

CONFIG_DIR = commands.EXAMPLES / "config"
EXAMPLE = OmegaConf.load(CONFIG_DIR / "avgk_tiny.yaml")
RECIPE = (
    *("--task", "sffn_language_modeling", "--no-epoch-checkpoints", "--adam-betas", "(0.9,0.98)"),
    *("--lr", f"{EXAMPLE.optimization.lr[0]}", "--clip-norm", f"{EXAMPLE.optimization.clip_norm}"),
    *("--warmup-updates", f"{EXAMPLE.lr_scheduler.warmup_updates}"),
    *("--total-num-update", f"{EXAMPLE.lr_scheduler.total_num_update}"),
    *("--lr-scheduler", "polynomial_decay"),
)
"""The example as flags, without those that ``commands.train`` sets."""
SMALLER = (
    *("common.log_format=json", "common.log_interval=1", "common.no_progress_bar=true"),
    *("task.tokens_per_sample=16", "dataset.batch_size=8", "dataset.num_workers=0"),
    *("optimization.max_update=6", "+model.decoder_layers=2", "+model.decoder_embed_dim=16"),
    *("+model.decoder_ffn_embed_dim=32", "+model.decoder_attention_heads=2"),
)
"""The settings of ``commands.train`` for hydra."""
OF_MODEL = {
    "avgk": ("+model.sffn_block_size=8",),
    "rand_hash": ("+model.sffn_block_size=8",),
    "pkm": ("+model.sffn_active_blocks=16",),
    "sffn": (
        *("+model.sffn_selector=avgk", "+model.sffn_block_size=8"),
        "+model.sffn_gate=sigmoid",
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_hydra_trains_what_arch_trains(model: str, data_bin: Path, tmp_path: Path) -> None:
    overrides = (*SMALLER, *OF_MODEL.get(model, ()), f"model._name=transformer_lm_{model}_tiny")
    hydra_log = commands.hydra_train(data_bin, tmp_path / "hydra", *overrides)
    arch_log = commands.train(data_bin, tmp_path / "arch", model, *RECIPE)
    assert len(losses(hydra_log)) == 6
    assert logged(hydra_log, "loss", "gnorm", "lr") == logged(arch_log, "loss", "gnorm", "lr")
    by_hydra, by_arch = (last_checkpoint(tmp_path / way)["cfg"] for way in ("hydra", "arch"))
    for part in ("model", "criterion", "optimizer", "lr_scheduler"):
        assert by_hydra[part] == by_arch[part]


def arch_config(data: Path, arch: str, *flags: str) -> Any:
    parser = options.get_training_parser("language_modeling")
    base = [str(data), "--user-dir", USER_DIR, "--task", "language_modeling", "--arch", arch]
    return convert_namespace_to_omegaconf(
        options.parse_args_and_arch(parser, [*base, "--optimizer", "adam", *flags])
    )


def hydra_resolved(config: Any, arch: str, **model: Any) -> Any:
    config = OmegaConf.create(OmegaConf.to_container(config))
    with open_dict(config):
        config.model = {"_name": arch, **model}
        config.task = {"_name": "language_modeling", "data": config.task.data}
    add_defaults(config)
    return OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))


@pytest.fixture(scope="module")
def some_hydra_config(data_bin: Path) -> Any:
    return commands.hydra_config(commands.override("task.data", data_bin))


@pytest.mark.parametrize("size", ["", "_gpt3_medium"])  # _tiny was just trained
@pytest.mark.parametrize("model", MODELS)
def test_names_resolve_to_the_same_model(
    model: str, size: str, data_bin: Path, some_hydra_config: Any
) -> None:
    arch = f"transformer_lm_{model}{size}"
    by_arch = arch_config(data_bin, arch).model
    assert hydra_resolved(some_hydra_config, arch).model == by_arch
    expected = {"": 512, "_gpt3_medium": 1024}[size]
    assert by_arch.decoder_embed_dim == by_arch.decoder_output_dim == expected


DEFAULTS = {
    "share_decoder_input_output_embed": True,
    "decoder_normalize_before": True,
    "decoder_layers": 4,
    "sffn_freq": 2,
}
ASKED = {
    ("--share-decoder-input-output-embed",): {"share_decoder_input_output_embed": True},
    ("--decoder-normalize-before",): {"decoder_normalize_before": True},
    ("--dropout", "0.3"): {"dropout": 0.3},
    ("--activation-fn", "gelu"): {"activation_fn": "gelu"},
    ("--decoder-layers", "6"): {"decoder_layers": 6},
    ("--decoder-embed-dim", "32"): {"decoder_embed_dim": 32},
    ("--decoder-ffn-embed-dim", "64"): {"decoder_ffn_embed_dim": 64},
    ("--sffn-freq", "1"): {"sffn_freq": 1},
    ("--sffn-expansion", "4"): {"sffn_expansion": 4},
    ("--sffn-gate", "softmax"): {"sffn_gate": "softmax"},
    ("--avgk-exclude-bias",): {"avgk_exclude_bias": True},
    ("--decoder-input-dim", "8"): {"decoder_input_dim": 8},
    ("--decoder-output-dim", "8"): {"decoder_output_dim": 8},
}
ASKED_OTHERWISE = {
    ("--no-share-decoder-input-output-embed",): {"share_decoder_input_output_embed": False},
    ("--no-decoder-normalize-before",): {"decoder_normalize_before": False},
}


@pytest.mark.parametrize("asked", [{(): DEFAULTS}, ASKED, ASKED_OTHERWISE])
def test_user_flags_beat_defaults(
    asked: dict[tuple[str, ...], dict[str, Any]], data_bin: Path, some_hydra_config: Any
) -> None:
    expected = {name: value for values in asked.values() for name, value in values.items()}
    flags = [word for flag in asked for word in flag]
    by_arch = arch_config(data_bin, "transformer_lm_avgk_tiny", *flags).model
    options = expected if flags else {}
    by_hydra = hydra_resolved(some_hydra_config, "transformer_lm_avgk_tiny", **options).model
    assert {name: by_arch[name] for name in expected} == expected
    assert by_arch == by_hydra


def test_flags_tie_and_untie_the_built_model(data_bin: Path) -> None:
    def build(*flags: str) -> Any:
        config = arch_config(data_bin, "transformer_lm_avgk_tiny", *commands.SMALL, *flags)
        config.model.sffn_block_size = 8
        return tasks.setup_task(config.task).build_model(config.model).decoder

    tied = build("--share-decoder-input-output-embed")
    assert tied.output_projection.weight is tied.embed_tokens.weight
    untied = build("--no-share-decoder-input-output-embed", "--no-decoder-normalize-before")
    assert untied.output_projection.weight is not untied.embed_tokens.weight
    assert tied.layer_norm is not None and untied.layer_norm is None


# The real scripts


def script(name: str, *arguments: object, cwd: Path, stdin: str = "") -> str:
    """Run a console script and return its output."""
    process = subprocess.run(
        [Path(sys.executable).parent / f"fairseq-{name}", *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def scripted(
    data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[int, str]]:
    """Train by the README's command from the project root. Return data, folder of the checkpoints,
    and losses."""
    folder = tmp_path_factory.mktemp("scripts")
    data = shutil.copytree(data_bin, folder / "data")
    for kind in ("bin", "idx"):  # the validation split is too short for a batch at 128 tokens
        shutil.copy(data / f"train.{kind}", data / f"valid.{kind}")
    log = script(
        *("train", data, "--user-dir", "fairseq_sffn", "--task", "language_modeling"),
        *("--arch", "transformer_lm_avgk_tiny", "--criterion", "sffn_cross_entropy"),
        *("--optimizer", "adam", "--lr", "1e-3", "--tokens-per-sample", "128"),
        *("--batch-size", "16", "--max-update", "3", "--cpu", "--save-dir", folder / "ckpt"),
        *("--log-format", "json", "--log-interval", "1"),
        cwd=ROOT,
    )
    return data, folder / "ckpt", losses(log)


def test_script_trains_from_the_project_root(
    scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path
) -> None:
    _, save_dir, by_script = scripted
    assert list(by_script) == [1, 2, 3] and (save_dir / "checkpoint_last.pt").is_file()
    state = last_checkpoint(save_dir)
    assert state["cfg"]["common"]["user_dir"] == "fairseq_sffn"
    assert state["model"]["decoder.layers.3.fc1.memory.keys"].shape == (16 * 512, 128)


def test_script_evaluates_from_another_directory(
    scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path
) -> None:
    data, save_dir, _ = scripted
    checkpoint = save_dir / "checkpoint_last.pt"
    log = script(
        *("eval-lm", data, "--user-dir", USER_DIR, "--path", checkpoint, "--cpu"), cwd=tmp_path
    )
    assert "the model has 128 positions; evaluating at 128" in log
    in_process = commands.apply("eval-lm", data, checkpoint, "--tokens-per-sample", "128")
    assert commands.perplexity(log) == commands.perplexity(in_process)


def test_script_generates(scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path) -> None:
    data, save_dir, _ = scripted
    output = script(
        *("generate", data, "--user-dir", USER_DIR, *SENTENCES, "--batch-size", "16"),
        *("--path", save_dir / "checkpoint_last.pt", "--cpu", "--beam", "1", "--max-len-b", "8"),
        cwd=tmp_path,
    )
    assert len(hypotheses(output)) == 40


def test_script_is_interactive(scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path) -> None:
    data, save_dir, _ = scripted
    output = script(
        *("interactive", data, "--user-dir", "fairseq_sffn", "--task", "language_modeling"),
        *("--path", save_dir / "checkpoint_last.pt", "--cpu", "--beam", "1", "--max-len-b", "9"),
        cwd=ROOT,
        stdin="the n1 v2\n",
    )
    assert hypotheses(output)["0"][0].startswith("the n1 v2 ")


def test_script_trains_with_hydra(data_bin: Path, tmp_path: Path) -> None:
    log = script(
        *("hydra-train", "--config-dir", CONFIG_DIR, "--config-name", "avgk_tiny", *SMALLER),
        *(override("task.data", data_bin), override("common.user_dir", USER_DIR)),
        *(override("hydra.run.dir", tmp_path), *OF_MODEL["avgk"]),
        cwd=ROOT,
    )
    by_arch = commands.train(data_bin, tmp_path / "arch", "avgk", *RECIPE)
    assert losses(log) == losses(by_arch)
    by_hydra = last_checkpoint(tmp_path / "checkpoints")["cfg"]
    assert by_hydra["model"] == last_checkpoint(tmp_path / "arch")["cfg"]["model"]
