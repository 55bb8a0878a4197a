"""Settings that are refused before training, and the environment of torchrun."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq.distributed import utils as distributed_utils
from omegaconf import open_dict

from fairseq_sffn.errors import UsageError
from fairseq_sffn.expert_parallel import launch
from fairseq_sffn.expert_parallel.settings import check_settings, first_difference, settings_of
from tests import commands


def settings(**changes: Any) -> SimpleNamespace:
    """Make the parts of fairseq's configuration that matter here."""
    groups = {
        "distributed_training": dict(
            **dict(ddp_backend="pytorch_ddp", zero_sharding="none"),
            **dict(pipeline_model_parallel=False, distributed_world_size=2),
        ),
        "common": dict(
            **dict(cpu=True, fp16=False, bf16=False, amp=False, fp16_no_flatten_grads=False),
            **dict(memory_efficient_fp16=False, model_parallel_size=1),
        ),
        "model": dict(sffn_expert_parallel=2, encoder_layerdrop=0, decoder_layerdrop=0),
        "task": dict(eval_bleu=False),
        "optimization": dict(use_bmuf=False),
        "optimizer": dict(_name="adam"),
        "ema": dict(store_ema=False),
        "checkpoint": dict(write_checkpoints_asynchronously=False),
    }
    names = {name for values in groups.values() for name in values}
    assert changes.keys() <= names
    return SimpleNamespace(
        **{
            group: SimpleNamespace(**{k: changes.get(k, v) for k, v in values.items()})
            for group, values in groups.items()
        }
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ddp_backend="fully_sharded"), "--ddp-backend fully_sharded: needs GPUs"),
        (dict(ddp_backend="slowmo"), "--ddp-backend slowmo: not with --sffn-expert-parallel 2"),
        (dict(fp16=True), "--fp16: needs --fp16-no-flatten-grads with --sffn-expert-parallel 2"),
        (dict(amp=True), "--amp: not with --sffn-expert-parallel 2"),
        (dict(zero_sharding="os"), "--zero-sharding os: not with"),
        (dict(use_bmuf=True), "--use-bmuf: not with"),
        (dict(store_ema=True), "--store-ema: not with"),
        (dict(_name="adafactor"), "--optimizer adafactor: not with"),
        (dict(_name="lamb"), "--optimizer lamb: not with"),
        (dict(model_parallel_size=2), "--model-parallel-size 2: not with"),
        (dict(pipeline_model_parallel=True), "--pipeline-model-parallel: not with"),
        (dict(write_checkpoints_asynchronously=True), "--write-checkpoints-asynchronously: not"),
        (dict(eval_bleu=True), "--eval-bleu: not with --sffn-expert-parallel 2"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_settings(settings(**changes))
    assert "\n" not in str(caught.value)
    if "fully_sharded" not in message:  # without blocks to shard, fairseq handles these
        check_settings(settings(**changes, sffn_expert_parallel=1))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_layerdrop_is_refused_in_several_processes(side, shards):
    changes = {f"{side}_layerdrop": 0.5, "sffn_expert_parallel": shards}
    with pytest.raises(UsageError, match=f"--{side}-layerdrop 0.5: not with sparse layers"):
        check_settings(settings(**changes))
    if shards == 1:
        check_settings(settings(**changes, distributed_world_size=1))
    # The configuration of an encoder-decoder model has these names.
    grouped = settings(sffn_expert_parallel=shards)
    setattr(grouped.model, side, SimpleNamespace(layerdrop=0.5))
    with pytest.raises(UsageError, match=f"--{side}-layerdrop 0.5: not with sparse layers"):
        check_settings(grouped)
    # Other models may drop any layers.
    del grouped.model.sffn_expert_parallel
    check_settings(grouped)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("optimizer._name=sgd", "--optimizer is adam on rank 0 and sgd on rank 1"),
        ("criterion._name=other", "--criterion is sffn_cross_entropy on rank 0 and other on rank"),
        ("lr_scheduler._name=cosine", "--lr-scheduler is "),
        ("model._name=other", "--arch is "),
        ("task._name=other", "--task is "),
        ("common.seed=7", "--seed is 1 on rank 0 and 7 on rank 1"),
        ("+model.added=null", "--added is missing on rank 0 and None on rank 1"),
    ],
)
def test_the_first_difference_is_named(change, difference):
    first, other = (settings_of(commands.hydra_config(*c)) for c in ((), (change,)))
    assert first_difference([first, first]) is None
    assert difference in first_difference([first, other])


def test_what_one_rank_has_does_not_count():
    first, other = (
        settings_of(commands.hydra_config(f"distributed_training.distributed_rank={rank}"))
        for rank in (0, 1)
    )
    assert first_difference([first, other]) is None


def test_where_hydra_logs_does_not_count():
    first, other = (commands.hydra_config() for _ in range(2))
    with open_dict(other):
        other.job_logging_cfg = {"file": "outputs/12-00-01"}
    assert first_difference([settings_of(first), settings_of(other)]) is None


def test_processes_that_would_train_alone(data_bin, tmp_path, monkeypatch):
    """fairseq-hydra-train reads the plugin after it has looked for torchrun. On a machine without a
    GPU, it looks in vain."""
    for name in launch.LAUNCHED:
        monkeypatch.setenv(name, "2")
    call_main = inspect.unwrap(distributed_utils.call_main)
    monkeypatch.setattr(distributed_utils, "call_main", call_main)
    with pytest.raises(UsageError, match="torchrun has started 2 processes"):
        commands.hydra_train(data_bin, tmp_path)
    assert not list(tmp_path.iterdir())


def test_versions_count():
    settings = settings_of(commands.hydra_config())
    for name in ("fairseq", "PyTorch", "fairseq_sffn's code"):
        other = settings | {("", name): "another"}
        assert f"{name} is " in first_difference([settings, other])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ddp_backend="legacy_ddp", _name="sffn_adam"),
        dict(fp16=True, fp16_no_flatten_grads=True),
        dict(fp16=True, memory_efficient_fp16=True),
        dict(bf16=True),  # fairseq never flattens bf16 with it
    ],
)
def test_not_refused(changes):
    check_settings(settings(**changes))


@pytest.mark.parametrize("shards", ["2", "0", "-1"])
def test_shards_that_do_not_divide_the_processes(shards, data_bin, tmp_path):
    with pytest.raises(UsageError, match=f"--sffn-expert-parallel {shards}: "):
        commands.train(data_bin, tmp_path, "avgk", "--sffn-expert-parallel", shards)


@pytest.mark.parametrize("model", ["vanilla_m", "lorkm", "pkm"])
def test_a_method_that_needs_all_keys(model, data_bin, tmp_path):
    with pytest.raises(UsageError, match=f"--sffn-expert-parallel 2: {model} (scores|has)"):
        commands.train(data_bin, tmp_path, model, "--sffn-expert-parallel", "2")


def test_more_processes_than_gpus_are_torchruns(data_bin, tmp_path):
    with pytest.raises(UsageError, match=r"--distributed-world-size 2: .* torchrun"):
        commands.train(data_bin, tmp_path, "avgk", "--distributed-world-size", "2")


def test_fairseqs_own_processes_need_gpus(data_bin, tmp_path, monkeypatch):
    """Without a GPU fairseq would start no process, and end as if it had trained."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    method = ("--distributed-init-method", "tcp://localhost:29999", "--distributed-rank", "0")
    with pytest.raises(
        UsageError, match=r"--distributed-init-method .* torchrun --nproc_per_node 2"
    ):
        commands.train(data_bin, tmp_path, "avgk", "--distributed-world-size", "2", *method)


@pytest.mark.parametrize(("world_size", "method"), [("4", "env://"), ("1", None)])
def test_torchruns_environment(world_size, method, monkeypatch):
    environment = dict(WORLD_SIZE=world_size, RANK="3", LOCAL_RANK="1")
    for name, value in dict(MASTER_ADDR="a", MASTER_PORT="1", **environment).items():
        monkeypatch.setenv(name, value)
    started: list[Any] = []
    monkeypatch.setattr(distributed_utils, "distributed_main", lambda *args: started.append(args))
    cfg = commands.hydra_config()
    config = cfg.distributed_training
    distributed_utils.call_main(cfg, lambda cfg: started.append(cfg))
    assert len(started) == 1 and (started[0] is cfg) == (world_size == "1")
    assert config.distributed_init_method == method
    assert config.distributed_world_size == int(world_size)
    assert (config.distributed_rank, config.device_id, config.distributed_no_spawn) == (3, 1, True)


@pytest.mark.parametrize(
    ("restarts", "shared", "world_size", "refused"),
    [
        ("3", "True", "2", True),
        ("3", "False", "2", False),
        ("0", "True", "2", False),
        ("3", "True", "1", False),
    ],
)
def test_restarts_that_would_wait_for_ever(restarts, shared, world_size, refused, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    if refused:
        with pytest.raises(UsageError, match=r"--max-restarts 3: .*SHARE_RDZV_TCP_STORE=1"):
            launch.check_restarts()
    else:
        launch.check_restarts()
