"""Options of models, tasks and evaluation, through whole trainings."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils

from fairseq_sffn.memory.selectors.hash_layer import balanced_table
from tests import commands
from tests.commands import losses, records
from tests.integration.flags import EVERY_SAMPLE
from tests.integration.outputs import hypotheses, last_checkpoint, logged, valid_ppl

SPARSE = ("avgk", "switch", "hash_layer")
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
        ("mixed", (*EVERYTHING[:5], *EXTRA_LOSSES)),
        ("switch", ("--offload-activations", "--decoder-layerdrop", "0.5")),
        ("avgk", ("--activation-dropout", "0.2", "--activation-fn", "gelu")),
        ("avgk", ("--sffn-active-blocks", "1", "--sffn-block-size", "1", "--avgk-exclude-bias")),
        ("switch", ("--sffn-active-blocks", "2", "--sffn-block-size", "16", "--sffn-init-scale=2")),
        ("hash_layer", ("--hash-table", "balanced", "--no-share-decoder-input-output-embed")),
        ("switch", ("--decoder-learned-pos", "--no-decoder-normalize-before")),
        ("avgk", ("--sffn-capacity-factor", "1.0", "--sffn-engine", "loop")),
        ("dense", ("--sffn-glu", "silu", "--checkpoint-activations", *CHARACTERS)),
        ("avgk", ("--sffn-glu", "silu", "--sffn-shared-blocks", "2", *EVERYTHING, *EXTRA_LOSSES)),
        ("switch", ("--sffn-glu=gelu", "--sffn-glu-width=48", "--sffn-value-lr-scale=2")),
        ("gshard", ("--sffn-shared-blocks", "1", "--sffn-active-blocks", "3", *EXTRA_LOSSES)),
        ("hash_layer", ("--sffn-shared-blocks", "1", "--sffn-active-blocks", "2")),
        ("pkm", ("--sffn-shared-blocks", "4", "--sffn-value-lr-scale", "2")),
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


def test_layers_of_a_plan_are_kept_as_they_were_trained(data_bin: Path, tmp_path: Path) -> None:
    plan = "hash_layer:0,avgk/block_size=8:1,switch:3"
    commands.train(data_bin, tmp_path, "mixed", "--decoder-layers", "4", "--sffn-layers", plan)
    checkpoint = tmp_path / "checkpoint_last.pt"
    full = commands.evaluate(data_bin, checkpoint)
    found = {
        keep: commands.evaluate(
            *(data_bin, checkpoint, "--model-overrides", str({"decoder_layers_to_keep": keep}))
        )
        for keep in ("0,1,2,3", "1,3", "3,1", "2")
    }
    assert found["0,1,2,3"] == full and found["1,3"] == found["3,1"]
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("model", ["avgk", "switch", "pkm"])
def test_a_uniform_plan_trains_the_same_model(model: str, data_bin: Path, tmp_path: Path) -> None:
    """By the name of the model, and by its selector. Dropout is on."""
    of_model = commands.OF_MODEL.get(model, ())
    runs = {
        "freq": (model, ()),
        "named": (model, ("--sffn-layers", f"{model}:1")),
        "sffn": ("sffn", ("--sffn-layers", f"{model}:1")),
    }
    saved, logs = {}, {}
    for run, (name, flags) in runs.items():
        arch = ("--arch", f"transformer_lm_{name}_tiny")
        logs[run] = records(
            commands.train(data_bin, tmp_path / run, model, *arch, *of_model, *flags)
        )
        saved[run] = last_checkpoint(tmp_path / run)
    for run in ("named", "sffn"):
        for part in ("model", "last_optimizer_state"):
            torch.testing.assert_close(saved[run][part], saved["freq"][part], rtol=0, atol=0)
        assert list(saved[run]["model"]) == list(saved["freq"]["model"])
        for ours, theirs in zip(logs[run], logs["freq"], strict=True):
            timed = {"wps", "ups", "train_wall", "wall"}
            assert {k: ours[k] for k in ours if k not in timed} == {
                k: theirs[k] for k in theirs if k not in timed
            }


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
