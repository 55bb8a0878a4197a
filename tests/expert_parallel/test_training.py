"""Several processes train as one process does with all their sentences. They are 2 and 4 with gloo,
with every model, and with blocks sharded over 1, 2 and 4."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import commands
from tests.expert_parallel import launch

UPDATES = 17
"""Number of updates. An epoch is 15 batches of 16 sentences, and its last batch has one sentence.
In four processes, three of them have none of it."""
FLAGS = (
    *launch.SAME_SENTENCES,
    *("--max-update", f"{UPDATES}", "--required-batch-size-multiple", "1", "--clip-norm", "0.5"),
    *("--batch-size", "16", "--no-epoch-checkpoints", "--no-save-optimizer-state"),
)
LOADS = (
    *("balance_loss", "load_entropy", "load_max", "load_min", "load_kl", "unused_blocks"),
    *("dropped_share", "routed_mass", "gate_entropy", "bias_range"),
)
OF_MODEL = {
    # avgk with a gate
    "sffn": (
        *("--balance-loss-weight", "0.05", "--balance-loss-scope", "sequence"),
        *("--sffn-balance-rate", "0.001"),
    ),
    "switch": ("--z-loss-weight", "0.01", "--optimizer", "sffn_adam"),
    "gshard": ("--checkpoint-activations", "--balance-loss-scope", "global"),
    "base": ("--base-scope", "world"),
}
MODELS = (*commands.MODELS, "sffn", "mixed")
BACKENDS = {2: "legacy_ddp", 4: "pytorch_ddp"}
SHARDS = {
    **{("avgk", 2): [1, 2], ("avgk", 4): [1, 2, 4]},
    **{(model, 2): [2] for model in ("base", "mixed")},
    **{(model, 4): [1, 4] for model in ("base", "mixed")},
    **{("dense", 2): [1], ("dense", 4): [1], ("vanilla_m", 4): [1], ("lorkm", 2): [1]},
    **{("pkm", 4): [1], ("aoe", 2): [1], ("pkm_ffn", 4): [2], ("rand_hash", 2): [2]},
    **{("hash_layer", 4): [1, 4], ("switch", 2): [1], ("switch", 4): [2], ("moe", 4): [4]},
    **{("gshard", 2): [2], ("gshard", 4): [1], ("sigma_moe", 4): [2], ("hash_moe", 4): [4]},
    **{("sffn", 2): [1], ("sffn", 4): [2], ("gshard_8d", 4): [1], ("pkm_4d", 2): [1]},
}
"""Model and number of processes -> numbers of shards. test_memory.py compares the memories of all
cases with 1, 2 and 4 shards, so that here one model trains in every way and the others in some."""
RUNS = [(model, world, shards) for (model, world), parts in SHARDS.items() for shards in parts]


def test_every_model_is_here() -> None:
    assert {model for model, _ in SHARDS} == set(MODELS)


def flags(model: str, world: int = 1, shards: int = 1) -> tuple[str, ...]:
    result = (*FLAGS, *OF_MODEL.get(model, ()), "--batch-size", f"{16 // world}")
    if world > 1:
        result += ("--ddp-backend", BACKENDS[world])
    return result + (("--sffn-expert-parallel", f"{shards}") if shards > 1 else ())


def logged(log: str) -> dict[int, dict[str, Any]]:
    return {int(record["num_updates"]): record for record in commands.records(log)}


@pytest.fixture(scope="module")
def alone(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return model -> log of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        model: logged(commands.train(data_bin, folder / model, model, *flags(model)))
        for model in MODELS
    }


@pytest.fixture(scope="module")
def together(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return run -> log of several processes, with the folder of the checkpoints."""
    folder, logs = tmp_path_factory.mktemp("together"), {}
    for world in BACKENDS:
        jobs = {
            f"{model}-{shards}": launch.training(
                data_bin, folder / f"{world}-{model}-{shards}", model, *flags(model, world, shards)
            )
            for model, size, shards in RUNS
            if size == world
        }
        if world == 2:
            several = (*flags("avgk", 2, 2), "--batch-size", "4", "--update-freq", "2")
            save_dir = folder / "several"
            averaged = (*flags("avgk", 2), "--store-ema", "--ema-decay", "0.9")
            jobs["averaged"] = launch.training(data_bin, folder / "averaged", "avgk", *averaged)
            jobs["several"] = launch.training(data_bin, save_dir, "avgk", *several)
        done = launch.train(world, folder / f"jobs{world}", jobs)
        logs |= {f"{world}-{name}": (logged(log), folder) for name, log in done.items()}
    return logs


@pytest.mark.parametrize(("model", "world", "shards"), RUNS)
def test_loss_curve_of_one_process(model, world, shards, alone, together):
    """The gradients, selections and balance of the first update are those of one process. 16
    updates later, rounding makes losses differ, as Adam divides by tiny gradients."""
    want, (got, _) = alone[model], together[f"{world}-{model}-{shards}"]
    assert list(got) == list(want) == list(range(1, UPDATES + 1))
    for key in ("loss", "gnorm", "wpb", "bsz", *LOADS):
        if key in want[1]:
            tolerance = 2e-3 if key in ("loss", "gnorm", "balance_loss") else 1e-4
            assert float(got[1][key]) == pytest.approx(float(want[1][key]), abs=tolerance), key
    for update, record in want.items():
        assert got[update]["wpb"] == record["wpb"]
        # Rounding changes the best assignment.
        tolerance = 0.05 if model == "base" else 0.02
        assert float(got[update]["loss"]) == pytest.approx(float(record["loss"]), abs=tolerance)
    assert ("sent_bytes" in got[1]) == (shards > 1)


@pytest.mark.parametrize(("model", "world"), SHARDS)
def test_evaluated_by_one_process(model, world, together, data_bin):
    """fairseq-eval-lm reads a sharded checkpoint as any other. It finds the perplexity of the
    processes' validation, except for the batches that fairseq's training leaves out."""
    perplexities = []
    for shards in SHARDS[model, world]:
        folder = together[f"{world}-{model}-{shards}"][1]
        save_dir = folder / f"{world}-{model}-{shards}"
        last = save_dir / "checkpoint_last.pt"
        in_parts = torch.load(last, weights_only=True)["sffn"]
        assert in_parts.get("shards", 1) == shards
        assert shards == 1 or len(list((save_dir / in_parts["folder"]).iterdir())) == shards
        perplexities.append(commands.evaluate(data_bin, last))
    assert max(perplexities) <= 1.02 * min(perplexities)
    first = SHARDS[model, world][0]
    assert perplexities[0] < 0.5 * float(together[f"{world}-{model}-{first}"][0][1]["ppl"])


def test_several_batches_an_update(alone, together):
    """Two processes shard the blocks, with two batches each per update. At the end of an epoch one
    has a batch of one sentence, and the other has none."""
    want, (got, _) = alone["avgk"], together["2-several"]
    assert list(got) == list(want)
    for update, record in want.items():
        assert got[update]["wpb"] == record["wpb"]
        assert float(got[update]["loss"]) == pytest.approx(float(record["loss"]), abs=0.02)


def test_moving_averages(alone, together):
    losses = [
        {i: r["loss"] for i, r in logs.items()}
        for logs in (alone["avgk"], together["2-averaged"][0])
    ]
    assert losses[0] == losses[1]
