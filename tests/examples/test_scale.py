"""The plans of ``examples/scale``."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.scale import scale
from fairseq_sffn.tools.language_model import build_language_model
from fairseq_sffn.tools.plan import Setting, plan_figures

FOLDER = Path(scale.__file__).parent


def test_the_table_is_what_the_script_writes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[experiments]'")
    scale.main([str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == (FOLDER / "results" / "table.md").read_text()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_an_update_of_several_micro_batches() -> None:
    """Sparse layers send in each of 16 micro-batches, gradients once."""
    machine = scale.Machine(disk=1.0)
    model = build_language_model("transformer_lm_switch_tiny", 1000, 2048, [])
    row = scale.plan_row("gpt3_medium", "switch", model, 64, 16, machine)
    setting = Setting(64, 16, 4096, 2048, "bf16", 40.0, 400.0, 8, 300.0)
    figures = plan_figures(model, setting)
    sent, between = figures["sent"], figures["sent_between_nodes"]
    gradients = between["replicated_gradients"] + between["sharded_gradients"]
    assert row.between * 1e9 == pytest.approx(16 * between["sparse_layers"] + gradients)
    every = 16 * sent["sparse_layers"] + sent["replicated_gradients"] + sent["sharded_gradients"]
    assert (row.inside + row.between) * 1e9 == pytest.approx(every)
    seconds = 2**16 / row.speed
    assert seconds * (1 - row.share) == pytest.approx(16 * figures["compute_seconds"])
    checkpoint = figures["checkpoint"]
    assert row.saving * 1e9 == pytest.approx(checkpoint["part"] + checkpoint["file"])
