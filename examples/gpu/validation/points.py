"""All points, the most informative first, as a run may be cut short."""

from __future__ import annotations

from . import layers, probes, speed, training, without_gpu
from .point import Point

POINTS = (
    Point("probes", 1, "versions, and the groups that grouped_mm takes", probes.groups, 90),
    Point("methods", 2, "every method against fp64", layers.every_method, 200),
    Point("paper_size", 3, "layers of the paper's size against fp64", layers.paper_size, 80),
    Point("layer_times", 9, "times of layers, beside the goals", speed.layers, 90),
    Point("curves", 5, "training in every precision against a CPU", training.curves, 180),
    Point("steps", 8, "memory and time of the paper's training step", speed.steps, 120),
    Point(
        *("waits", 4, "where the host waits for the device", probes.synchronizations, 60),
        on_cpu=False,
    ),
    Point("resuming", 6, "resuming, on the same and on another device", training.resuming, 100),
    Point("one_process", 7, "torchrun with one process", training.one_process, 80),
    Point("others", 9, "decoding, other libraries and a profile", speed.others, 60),
    Point("compiled", 2, "kernels compile for cards", without_gpu.compiled, 120, on_cuda=False),
    Point("fake_cuda", 4, "fake CUDA tensors", without_gpu.fake_cuda, 120, on_cuda=False),
)
