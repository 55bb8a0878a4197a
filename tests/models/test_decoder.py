"""What a token's output depends on: causality, neighbours, padding, incremental decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.memory.cases import close
from tests.models.small_lm import METHODS, SPARSE, TYPES, evaluated, pad, random_tokens, small_lm

OPTIONS = {
    "dense-silu": dict(sffn_glu="silu"),
    "avgk-silu": dict(sffn_glu="silu", sffn_shared_blocks=2),
    "vanilla_m-silu": dict(sffn_glu="silu"),
    "pkm-shared": dict(sffn_shared_blocks=4),
    "hash_layer-shared": dict(sffn_shared_blocks=1, sffn_active_blocks=2),
    "switch-gelu": dict(sffn_glu="gelu", sffn_shared_blocks=1, sffn_active_blocks=2),
}


@pytest.fixture(params=[*METHODS, "mixed", *OPTIONS])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return evaluated(request.param.partition("-")[0], **OPTIONS.get(request.param, {}))


# Evaluation: causality, neighbours, padding


def test_a_later_token_never_changes_an_earlier_output(model):
    batch = random_tokens(3, 8)
    output = model(batch)[0]
    for position in range(1, 8):
        other = batch.clone()
        other[:, position] = 4 + (batch[:, position] - 3) % (TYPES - 4)
        changed = model(other)[0]
        close(changed[:, :position], output[:, :position])
        assert (changed[:, position] - output[:, position]).abs().max() > 1e-3


def test_other_sentences_of_the_batch_do_not_matter(model):
    batch = random_tokens(6, 8)
    output = model(batch)[0]
    order = torch.randperm(6)
    close(model(batch[order])[0], output[order])
    for row in range(6):
        close(model(batch[row : row + 1])[0], output[row : row + 1])


def test_padding_on_the_right_changes_nothing(model):
    rows = [random_tokens(length) for length in (8, 5, 2)]
    batch = pad(rows, 11)
    output, extra = model(batch)
    alone = [model(row.unsqueeze(0)) for row in rows]
    for row, padded, (expected, _) in zip(rows, output, alone, strict=True):
        close(padded[: len(row)], expected[0])
    for number, routing in extra.get("routing", {}).items():
        single = [single_extra["routing"][number] for _, single_extra in alone]
        assert torch.equal(routing.counts, sum(layer.counts for layer in single))
        assert routing.counts.sum() == 15 * model.memory_configs[number].routed.active_blocks
        assert routing.dropped == 0


@pytest.mark.parametrize("method", [*SPARSE, "mixed"])
def test_padding_does_not_count_in_the_losses(method):
    model, row = evaluated(method), random_tokens(6)
    expected = model(row.unsqueeze(0), routing_losses=True)[1]["routing"]
    actual = model(pad([row], 9), routing_losses=True)[1]["routing"]
    for number, routing in expected.items():
        close(actual[number].balance_loss, routing.balance_loss)
        close(actual[number].z_loss, routing.z_loss)


def test_tokens_that_stand_for_none_count_nowhere():
    """In training on several processes, a process without sentences runs such tokens."""
    model = small_lm("switch").train()
    batch = random_tokens(2, 8)
    outputs, extra = model(batch, routing_losses=True)
    dummies, dummies_extra = model(batch, routing_losses=True, is_dummy=True)
    assert torch.equal(dummies, outputs) and extra["routing"]
    for name, layer in extra["routing"].items():
        assert layer.counts.sum() == 16 and layer.balance_loss > 0
        dummy = dummies_extra["routing"][name]
        assert dummy.counts.sum() == dummy.balance_loss == dummy.z_loss == 0


# Incremental decoding

# With an incremental state, fairseq computes attention's softmax in fp32.
FP32_SOFTMAX = dict(tolerance=1e-6)


def step_by_step(model: nn.Module, batch: Tensor, state: dict, start: int = 0) -> Tensor:
    """Return the outputs from position ``start`` on, computed one token at a time."""
    steps = [
        model.decoder(batch[:, : end + 1], incremental_state=state)
        for end in range(start, batch.shape[1])
    ]
    for _, extra in steps:
        for name, routing in extra.get("routing", {}).items():
            used = model.memory_configs[name].routed.active_blocks
            assert routing.counts.sum() == len(batch) * used
    return torch.cat([output for output, _ in steps], dim=1)


def test_incremental_decoding_is_full_decoding(model):
    batch = random_tokens(3, 8)
    close(step_by_step(model, batch, {}), model(batch)[0], **FP32_SOFTMAX)


def test_incremental_decoding_follows_reordered_beams(model):
    prefix, state = random_tokens(3, 4), {}
    step_by_step(model, prefix, state)
    order = torch.tensor([2, 0, 2])
    model.decoder.reorder_incremental_state_scripting(state, order)
    batch = torch.cat([prefix[order], random_tokens(3, 3)], dim=1)
    output = step_by_step(model, batch, state, start=4)
    close(output, model(batch)[0][:, 4:], **FP32_SOFTMAX)
