"""A whole checkpoint with payloads in its configuration, under every command that loads it."""

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_sffn.checkpoints.loading import OVERRIDE, TRUST
from fairseq_sffn.errors import UsageError
from fairseq_sffn.patches import stored_configuration as rules
from tests import commands
from tests.patches.payloads import PAYLOADS, Watch

# Loading checkpoints


@pytest.fixture(scope="module")
def saved(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the contents of a small checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    task = ("--task", "sffn_language_modeling", "--max-update", "1", "--adam-betas", "(0.9, 0.98)")
    commands.train(data_bin, folder, "avgk", *task)
    state: dict[str, Any] = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    return state


def load(state: Any, folder: Path, data: Path, **overrides: Any) -> Any:
    """Load a checkpoint as Python callers do."""
    path = folder / "checkpoint.pt"
    torch.save(state, path)
    return checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], {"data": str(data), **overrides}
    )


@pytest.mark.parametrize("payload", ["code", "file", "interpolation"])
def test_every_option_of_a_checkpoint(
    payload: str, saved: dict[str, Any], data_bin: Path, witness: Path, tmp_path: Path
) -> None:
    """Payloads are in each option from which something is built, including numbers and names, one
    at a time; in all options of another group together; and in unknown options."""
    text = PAYLOADS[payload].format(witness=str(witness))
    changed = []
    for group, options in saved["cfg"].items():
        if isinstance(options, dict):
            names = [[name] for name in (*options, "_target_")]
            if group not in rules.BUILT:
                names = [[*options, "_target_"]]
            changed += [(group, dict.fromkeys(some, text)) for some in names]
    for group, options in changed:
        cfg = copy.deepcopy(saved["cfg"])
        cfg[group] |= options
        try:
            _, loaded, _ = load({**saved, "cfg": cfg}, tmp_path, data_bin)
        except UsageError as error:
            assert "refused, its" in str(error) and group in rules.BUILT
        else:
            assert "witness" not in str(loaded).replace(str(data_bin), "")


def test_every_argument_of_an_older_checkpoint(saved: dict[str, Any], witness: Path) -> None:
    """fairseq before 0.10 stored a Namespace."""
    flat = flattened(saved["cfg"])
    for name, payload in itertools.product(
        (*flat, "bpe", "tokenizer", "user_dir", "other"), PAYLOADS.values()
    ):
        arguments = argparse.Namespace(**{**flat, name: payload.format(witness=str(witness))})
        try:
            kept = rules.safe_arguments(arguments, {})
        except UsageError:
            continue
        assert "witness" not in str(kept) and "${" not in str(kept), name


@pytest.mark.parametrize("name", ["arch", "task", "bpe", "data", "character_filters", "seed"])
def test_an_older_checkpoint_is_loaded_by_the_same_rules(
    name: str, saved: dict[str, Any], data_bin: Path, witness: Path, tmp_path: Path
) -> None:
    payload = PAYLOADS["code"].format(witness=str(witness))
    arguments = argparse.Namespace(**{**flattened(saved["cfg"]), name: payload})
    try:
        load({**saved, "cfg": None, "args": arguments}, tmp_path, data_bin)
    except UsageError as error:
        assert "refused, its" in str(error) and name != "data"


def flattened(cfg: dict[str, Any]) -> dict[str, Any]:
    names = {"arch": cfg["model"]["_name"], "task": cfg["task"]["_name"]}
    options = {**cfg["task"], **cfg["model"], "criterion": cfg["criterion"]["_name"], **names}
    del options["_name"]
    return options


def test_an_older_checkpoint_loads(saved: dict[str, Any], data_bin: Path, tmp_path: Path) -> None:
    arguments = argparse.Namespace(**flattened(saved["cfg"]))
    (model,), _, _ = load({**saved, "cfg": None, "args": arguments}, tmp_path, data_bin)
    torch.testing.assert_close(dict(model.state_dict()), dict(saved["model"]), rtol=0, atol=0)


def test_training_goes_on_from_an_older_checkpoint(
    saved: dict[str, Any], data_bin: Path, tmp_path: Path
) -> None:
    path = tmp_path / "old.pt"
    arguments = argparse.Namespace(**flattened(saved["cfg"]))
    torch.save({**saved, "cfg": None, "args": arguments}, path)
    for flag, first in (("--restore-file", 2), ("--finetune-from-model", 1)):
        log = commands.train(data_bin, tmp_path / flag, "avgk", flag, str(path))
        assert min(commands.losses(log)) == first


def test_sizes_that_come_with_a_name(saved: dict[str, Any], data_bin: Path, tmp_path: Path) -> None:
    """An architecture of fairseq fills in options that a checkpoint leaves out."""
    cfg = {**saved["cfg"], "model": {"_name": "transformer_lm_gpt3_175"}}
    with pytest.raises(UsageError, match="this machine has"):
        load({**saved, "cfg": cfg}, tmp_path, data_bin)


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(1), None, "word", 0, -3, 0.5])
@pytest.mark.parametrize("option", ["tokens_per_sample", "add_bos_token"])
def test_values_of_another_type(
    option: str, value: Any, saved: dict[str, Any], data_bin: Path, tmp_path: Path
) -> None:
    cfg = copy.deepcopy(saved["cfg"])
    cfg["task"][option] = value
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
        load({**saved, "cfg": cfg}, tmp_path, data_bin)


def test_training_settings_are_still_told(
    saved: dict[str, Any], data_bin: Path, tmp_path: Path
) -> None:
    """Numbers, switches and choices of all groups are in the log."""
    _, cfg, _ = load(saved, tmp_path, data_bin)
    stored = saved["cfg"]
    assert cfg.optimization.lr == stored["optimization"]["lr"]
    assert cfg.optimizer.adam_betas == stored["optimizer"]["adam_betas"]
    assert cfg.common.seed == stored["common"]["seed"] and cfg.common.cpu is True
    assert cfg.checkpoint.save_dir == "checkpoints"  # the default


# Payloads under every command


def poisoned(saved: dict[str, Any], witness: Path) -> dict[str, Any]:
    """Make the checkpoint of the bug report. fairseq evaluates its filters before it reads the
    rest."""
    cfg = copy.deepcopy(saved["cfg"])
    cfg["model"] |= {
        "character_embeddings": True,
        "share_decoder_input_output_embed": False,
        "character_filters": PAYLOADS["code"].format(witness=str(witness)),
    }
    return {**saved, "cfg": cfg}


COMMANDS: dict[str, Callable[[Path, Path, Path], Any]] = {
    **{
        command: lambda data, path, folder, command=command: commands.apply(
            *(command, data, path, "--task", "language_modeling", "--tokens-per-sample", "16"),
            stdin="the\n",
        )
        for command in ("eval-lm", "generate", "interactive")
    },
    "validate": lambda data, path, folder: commands.apply(
        *("validate", data, path, "--task", "language_modeling", "--batch-size", "8")
    ),
    "evaluate": lambda data, path, folder: commands.sffn(
        "evaluate", path, f"{data}:valid", "--cpu", "--tokens-per-sample", "16"
    ),
    "from_pretrained": lambda data, path, folder: TransformerLanguageModel.from_pretrained(
        str(path.parent), path.name, str(data)
    ),
    "ensemble": lambda data, path, folder: checkpoint_utils.load_model_ensemble(
        [str(path)], {"data": str(data)}
    ),
    "one file": lambda data, path, folder: checkpoint_utils.load_checkpoint_to_cpu(str(path)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses(
    command: str, saved: dict[str, Any], data_bin: Path, witness: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(poisoned(saved, witness), path)
    with pytest.raises(UsageError, match=r"refused, its --character-filters is .*--trust"):
        COMMANDS[command](data_bin, path, tmp_path)


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model", "--ema-seed-model"])
def test_training_does_not_look(
    flag: str, saved: dict[str, Any], data_bin: Path, witness: Path, tmp_path: Path
) -> None:
    """A training has its own configuration."""
    path = tmp_path / "checkpoint.pt"
    state = poisoned(saved, witness)
    if flag == "--ema-seed-model":
        state["extra_state"] = {**state["extra_state"], "ema": state["model"]}
    torch.save(state, path)
    flags = (flag, str(path), "--store-ema", "--max-update", "2")
    assert commands.losses(commands.train(data_bin, tmp_path / "run", "avgk", *flags))


def test_trust(
    saved: dict[str, Any], data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trust, fairseq acts as without the plugin. This shows that the tests above would notice
    a payload."""
    path = tmp_path / "checkpoint.pt"
    for number, trusting in enumerate(("flag", "override", "variable")):
        made = tmp_path / f"made{number}"
        torch.save(poisoned(saved, made), path)
        with monkeypatch.context() as patch, pytest.raises(BaseException):  # noqa: B017
            patch.setenv(TRUST, "" if trusting != "variable" else "1")
            if trusting == "flag":
                flags = ("--trust-checkpoint", "--tokens-per-sample", "16")
                commands.apply("eval-lm", data_bin, path, *flags)
            else:
                overrides = {OVERRIDE: True} if trusting == "override" else {}
                load(poisoned(saved, made), tmp_path, data_bin, **overrides)
        assert made.exists()


# Files that a checkpoint names


def test_a_folder_that_a_checkpoint_names_is_not_opened(
    saved: dict[str, Any], data_bin: Path, tmp_path: Path, watch: Watch
) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(saved, path)
    watch.opened.clear()
    watch.active = True
    with pytest.raises(UsageError, match="give arg_overrides="):
        checkpoint_utils.load_model_ensemble_and_task([str(path)])
    watch.active = False
    assert not [opened for opened in watch.opened if str(data_bin) in opened]
    for overrides in ({"data": str(data_bin)}, {"task": {"data": str(data_bin)}}, {OVERRIDE: True}):
        checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)


ENCODERS = {
    "sentencepiece": {"sentencepiece_model": "{file}"},
    "gpt2": {"gpt2_encoder_json": "{file}", "gpt2_vocab_bpe": "{file}"},
    "subword_nmt": {"bpe_codes": "{file}", "bpe_separator": "@@"},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_files_of_an_encoder_are_the_callers(
    name: str,
    saved: dict[str, Any],
    data_bin: Path,
    witness: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the files there is no encoder, and a line says so."""
    options = {option: value.format(file=str(witness)) for option, value in ENCODERS[name].items()}
    cfg = {**copy.deepcopy(saved["cfg"]), "bpe": {"_name": name, **options}}
    path = tmp_path / "checkpoint.pt"
    torch.save({**saved, "cfg": cfg}, path)
    hub = TransformerLanguageModel.from_pretrained(str(tmp_path), path.name, str(data_bin))
    assert hub.bpe is None
    assert f"the checkpoint's bpe, {name}, is left out" in caplog.text
    given = {option: "mine" for option in options if option in rules.FILES}
    kept = rules.safe_configuration(cfg, given)["bpe"]
    assert kept["_name"] == name and str(witness) not in str(kept)


@pytest.mark.parametrize("older", [False, True])
def test_an_encoder_without_files_is_kept(
    older: bool, saved: dict[str, Any], data_bin: Path, tmp_path: Path
) -> None:
    state = {**saved, "cfg": {**saved["cfg"], "bpe": "bytes", "tokenizer": {"_name": "space"}}}
    if older:
        arguments = argparse.Namespace(**flattened(saved["cfg"]), bpe="bytes", tokenizer="space")
        state |= {"cfg": None, "args": arguments}
    torch.save(state, tmp_path / "checkpoint.pt")
    hub = TransformerLanguageModel.from_pretrained(str(tmp_path), "checkpoint.pt", str(data_bin))
    assert type(hub.tokenizer).__name__ == "SpaceTokenizer"
    assert type(hub.bpe).__name__ == ("NoneType" if older else "Bytes")
