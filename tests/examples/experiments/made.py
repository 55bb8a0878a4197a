"""Makes up results, for tests of reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.files import Row, Scale, Table
from experiments.plan import Run, row_runs, sweep_runs
from experiments.results import Results

DOMAINS = ("fiction", "law")
SCALE = {
    **{"name": "made", "size": "tiny", "data": "data", "domains": "domains", "dictionary": 100},
    **{"updates": 40, "batch_size": 8, "tokens_per_sample": 16, "ffn_embed_dim": 512},
    **{"learning_rates": (0.001, 0.002), "flags": "--cpu", "tokens_per_second": 1000.0},
}


def scale(**changes: Any) -> Scale:
    """Make a small scale."""
    return Scale(**{**SCALE, **changes})


def scale_file(flags: str) -> str:
    """Make the text of a scale's file."""
    return f"""
size = "tiny"
data = "data"
domains = "domains"
dictionary = 100
updates = 40
batch_size = 8
tokens_per_sample = 16
ffn_embed_dim = 512
learning_rates = [1e-3, 2e-3]
flags = "{flags}"
tokens_per_second = 1000
"""


def perplexity(value: float) -> dict[str, float]:
    """Make the result on a set. Its loss does not match the perplexity, so tests see which one is
    read."""
    return {"loss": value / 100, "perplexity": value, "tokens": 1000}


def routing(blocks: int, seed: int = 1) -> dict[str, Any]:
    """Make the routing of a layer that uses all but one of its blocks."""
    counts = [*(10 * (i + seed) for i in range(blocks - 1)), 0]
    kept = [[(i * seed) % blocks] for i in range(12)]
    return {
        "counts": counts,
        "block_bits": 3.5,
        "token_bits": 1.75,
        "top_tokens": [[f"t{i}", "a|b`"] for i in range(blocks)],
        "blocks": kept,
        "positions": [i % 5 for i in range(12)],
    }


def result(test: float, blocks: int = 0, seed: int = 1, valid: float | None = None) -> Any:
    """Make the result of a run that was evaluated.

    Args:
        test: perplexity; out of domain it is 10 and 30 higher.
        blocks: number of blocks of each of two sparse layers.
        seed: varies the routing.
        valid: validation perplexity; the test perplexity if not given.
    """
    records = [
        {"update": float(u), "loss": 5.0, **({"load_max": 9 - u / 5, "unused_blocks": 10 - u / 4})}
        for u in range(8, 41, 8)
    ]
    evaluation = {"valid": perplexity(test if valid is None else valid), "test": perplexity(test)}
    evaluation |= {d: perplexity(test + 10 + 20 * i) for i, d in enumerate(DOMAINS)}
    layers = {name: routing(blocks, seed + i) for i, name in enumerate("13")} if blocks else {}
    return {
        "data": "abc",
        "machine": "2 cores of a processor",
        "versions": {"fairseq_sffn": "c0"},
        "training": {"train": records, "valid": records, "tokens_per_second": 1000.0 + seed},
        "evaluation": evaluation,
        "routing": layers,
    }


def diverged() -> Any:
    """Make the result of a run that diverged."""
    return result(1.0) | {"evaluation": {"valid": {"loss": None}}, "routing": {}}


def swept(loss: float | None) -> Any:
    """Make the result of a run that chooses a learning rate."""
    ppl = math.inf if loss is None else 2**loss
    evaluation = {"valid": {"loss": loss, "perplexity": ppl, "tokens": 1000}}
    kept = {name: value for name, value in result(1.0).items() if name != "routing"}
    return kept | {"evaluation": evaluation}


def fill(results: Results, rows: Iterable[Row], make: Callable[[Row, Run], Any | None]) -> Results:
    """Add the results of all runs of some rows. Sweeps choose 0.002. A function makes the other
    results, or ``None`` where one is missing."""
    for row in rows:
        for run in sweep_runs(row, results.scale).values():
            results.add(run, swept(2.0 if run.lr == 0.002 else 3.0))
        setting = results.setting(row)
        assert setting is not None
        for run in row_runs(row, results.scale, setting):
            found = make(row, run)
            if found is not None:
                results.add(run, found)
    return results


def table(*rows: Row, **others: Any) -> Table:
    """Make a table of perplexity."""
    return Table(**{"name": "t", "title": "T", "kind": "perplexity", "rows": rows, **others})


def empty(folder: Path, **changes: Any) -> Results:
    """Make an empty set of results."""
    return Results(folder / "results", scale(**changes))
