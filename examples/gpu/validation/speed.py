"""Points 8 and 9: memory and time, against the dense model and the goals."""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .point import Row, Setting, told
from .training import quiet

BENCHMARK = Path(__file__).parents[2] / "benchmark"
LAYER_GOALS = {
    ("avgk", 4096): 1.15,
    ("avgk", 256): 1.6,
    ("avgk", 64): 3.5,
    ("avgk", 16): 10.0,
    ("vanilla_m", 1): 16.0,
}
"""(selector, block size) -> time of a layer in units of the dense FFN's, forward and backward with
selection; bf16, N = 8192, d = 1024, on an H100."""

STEP_GOAL = 1.35
"""Time of a training step of Avg-K's `_gpt3_medium`, g = 64, in units of the dense model's step."""

PLANNED_SHARE = (0.7, 1.5)
"""Range of the peak memory in units of the estimate of ``fairseq-sffn plan``, which leaves out
short-lived buffers."""

VOCABULARY = 51200


def benchmark(name: str) -> Any:
    """Import a script of examples/benchmark. The scripts import each other by name."""
    if str(BENCHMARK) not in sys.path:
        sys.path.insert(0, str(BENCHMARK))
    return __import__(name)


def place_of(setting: Setting) -> Any:
    """Return bf16 on a GPU, fp32 on a CPU."""
    return benchmark("timing").Place(setting.device, "fp32" if setting.fake else "bf16")


def with_goal(what: str, ratio: float, goal: float | None, **more: Any) -> Row:
    """Return a row that is recorded with its goal. A missed goal is no fault."""
    goals = {} if goal is None else {"goal": goal, "met": ratio <= goal}
    return told(what, ratio=ratio, **goals, **more)


def layers(setting: Setting) -> Iterator[Row]:
    """Time a layer over block sizes and methods (point 9)."""
    layer = benchmark("layer")
    tokens, width, repeats = (64, 16, 2) if setting.fake else (8192, 1024, 10)
    rows = [layer.Row(name, min(g, 4 * width)) for name, g in LAYER_GOALS]
    rows += [layer.Row("switch", 4 * width), layer.Row("rand_hash", min(64, 4 * width))]
    if not setting.fake:
        rows += [layer.Row("avgk", 1024), layer.Row("pkm_ffn", 1), layer.Row("lorkm", 1)]
    for row in dict.fromkeys(rows):
        (measured,) = layer.measure(tokens, width, [row], repeats, place=place_of(setting))
        what = f"layer {row.selector} g={row.block_size}, {tokens} x {width}"
        goal = None if setting.fake else LAYER_GOALS.get((row.selector, row.block_size))
        yield with_goal(what, measured["ratio"]["median"], goal, figures=measured)
    if setting.fake:
        return
    for dtype in ("fp16", "fp32"):
        place = benchmark("timing").Place("cuda", dtype)
        row = layer.Row("avgk", 64)
        (measured,) = layer.measure(tokens, width, [row], repeats, place=place)
        what = f"layer avgk g=64, {tokens} x {width}, {dtype}"
        yield with_goal(what, measured["ratio"]["median"], None, figures=measured)


def steps(setting: Setting) -> Iterator[Row]:
    """Measure training steps of the dense model and of Avg-K at the paper's size: time, and peak
    memory beside the plan (points 8 and 9)."""
    size, context, vocabulary = "gpt3_medium", 2048, VOCABULARY
    if setting.fake:
        size, context, vocabulary = "tiny", 16, 1000
    planned = {
        model: {n: planned_bytes(model, size, vocabulary, context, n) for n in (4, 2, 1)}
        for model in ("dense", "avgk")
    }
    fits = [n for n in (4, 2, 1) if room_for(planned["avgk"][n], n * context, setting)]
    if not fits:
        yield told("training steps", skipped="this card has too little memory")
        return
    medians: dict[str, float] = {}
    for model in planned:
        figures = measure_steps(model, size, context, fits[0], vocabulary, setting)
        medians[model] = figures["seconds"]
        tokens = fits[0] * context
        figures |= {"tokens": tokens, "tokens_per_second": tokens / figures["seconds"]}
        figures["planned_bytes"] = planned[model][fits[0]]
        what = f"{model}_{size}, {fits[0]} x {context} tokens"
        if setting.fake:
            yield told(what, figures=figures)
            continue
        share = figures["peak_bytes"] / figures["planned_bytes"]
        low, high = PLANNED_SHARE
        yield {
            **told(f"{what}: peak memory / planned", value=share, figures=figures),
            "limit": list(PLANNED_SHARE),
            "passed": low <= share <= high,
        }
    goal = None if setting.fake else STEP_GOAL
    yield with_goal(f"step avgk_{size}, g=64", medians["avgk"] / medians["dense"], goal)


def planned_bytes(model: str, size: str, vocabulary: int, context: int, sentences: int) -> int:
    """Return the estimate of ``fairseq-sffn plan`` for one process in bf16."""
    from fairseq_sffn.tools import plan
    from fairseq_sffn.tools.language_model import build_language_model

    built = build_language_model(f"transformer_lm_{model}_{size}", vocabulary, context, [])
    setting = plan.Setting(1, 1, sentences * context, context, "bf16", 25.0, 100.0)
    return int(plan.plan_figures(built, setting)["memory"]["total"])


def room_for(planned: int, tokens: int, setting: Setting) -> bool:
    """Whether a training fits, including its logits in bf16 once and in fp32 twice."""
    if setting.fake:
        return True
    free, _ = torch.cuda.mem_get_info()
    return planned * 1.1 + tokens * VOCABULARY * 10 < free


def measure_steps(
    model: str, size: str, context: int, sentences: int, vocabulary: int, setting: Setting
) -> dict[str, Any]:
    """Return the median seconds of a training step, and the peak of memory."""
    timing, train_step = benchmark("timing"), benchmark("train_step")
    from fairseq.logging import metrics

    place = place_of(setting)
    repeats = 2 if setting.fake else 7
    torch.manual_seed(0)
    batch = train_step.random_batch(context, sentences, vocabulary)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet():
        train_step.write_dictionary(Path(folder), vocabulary)
        config = train_step.training_config(
            model, "adam", folder, context, sentences, size=size, place=place
        )
        trainer = train_step.build_trainer(config)
    work = timing.Work(lambda: trainer.train_step([batch]), prepare=metrics.reset)
    built = time.perf_counter() - start
    for _ in range(timing.WARM_UP[setting.device]):
        timing.seconds(work, device=setting.device)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [timing.seconds(work, device=setting.device) for _ in range(repeats)]
    figures = {"seconds": statistics.median(times), "all_seconds": times, "built_seconds": built}
    if setting.device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        del trainer, work
        gc.collect()  # the trainer and its parts refer to each other
        torch.cuda.empty_cache()
    return {**place.describe(), **figures}


def others(setting: Setting) -> Iterator[Row]:
    """Measure decoding, other libraries, and a profile of a layer (point 9)."""
    decode, peers = benchmark("decode"), benchmark("peers")
    place, fake = place_of(setting), setting.fake
    yield profile(setting)
    counts, widths = ((1,), (16,)) if fake else ((1, 8), (1024,))
    for row in decode.measure(2 if fake else 5, counts, widths, 1e-4 if fake else 0.01, place):
        what = f"decoding {row['tokens']} tokens, {row['selector']} g={row['block_size']}"
        yield told(what, ratio=row["ratio"]["median"], figures=row)
    tokens, width = (32, 16) if fake else (8192, 1024)
    for peer in peers.PEERS:
        (row,) = peers.measure(tokens, width, 2 if fake else 5, (peer,), place)
        what = f"{row['package']} {row['layer']}, {tokens} x {width}"
        if "error" in row:
            yield told(what, skipped=row["error"])
        else:
            yield told(what, ratio=row["ratio"]["median"], figures=row)


def profile(setting: Setting) -> Row:
    """Record the kernels that take most of a layer's forward and backward pass."""
    layer, timing = benchmark("layer"), benchmark("timing")
    place = place_of(setting)
    tokens, width = (64, 16) if setting.fake else (8192, 1024)
    row = layer.Row("avgk", 64)
    x = timing.hidden_states(tokens, width, place)
    token_ids = torch.zeros(tokens, dtype=torch.long, device=setting.device)
    memory = layer.build_memory(row, layer.memory_config(row, width, 4 * width), place)
    work = layer.training_work(memory, x, token_ids)
    timing.seconds(work, device=setting.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(3):
            timing.seconds(work, device=setting.device)
    trace = setting.folder / "trace.json"
    profiled.export_chrome_trace(str(trace))
    kind = "self_device_time_total" if setting.device == "cuda" else "self_cpu_time_total"
    spent: Callable[[Any], float] = lambda event: getattr(event, kind)  # noqa: E731
    events = sorted(profiled.key_averages(), key=spent, reverse=True)[:15]
    kernels = {event.key: round(spent(event) / 3) for event in events}
    return told(f"profile of avgk g=64, {tokens} x {width}", microseconds=kernels, trace=trace.name)
