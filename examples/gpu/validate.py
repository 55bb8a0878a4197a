"""Checks and measures the project on a GPU, in ten minutes. validate.sh starts it.

    python examples/gpu/validate.py [--fake] [--output FILE] [--only POINT ...] [--minutes N]
    python examples/gpu/validate.py --table FILE

The exit status is 1 if a check fails, if a point does not end, or if there is no GPU. A missed goal
for a time is reported, but is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The project need not be installed. The process of each point finds it by this path too.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

from validation import report  # noqa: E402
from validation.point import Point, Setting  # noqa: E402
from validation.points import POINTS  # noqa: E402
from validation.runner import Result, child, child_command, run_points  # noqa: E402

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic algorithms need it
    "KINETO_LOG_LEVEL": "6",
    "TOKENIZERS_PARALLELISM": "false",
}


def progress(text: str) -> None:
    print(text, flush=True)


def run(points: list[Point], setting: Setting, output: Path, minutes: float) -> list[Result]:
    """Run points, and write the JSON file after each."""
    results: list[Result] = []
    mode = "without a GPU" if setting.fake else "on a GPU"
    about = {"mode": mode, **report.environment(setting.device)}

    def told(point: Point, left: float) -> None:
        number = points.index(point) + 1
        clock = f"{left // 60:.0f}:{left % 60:02.0f}"
        progress(f"[{number}/{len(points)}] {point.name}: {point.title} ({clock} left)")

    command = child_command(Path(__file__), setting)
    for result in run_points(points, setting, command, minutes, told):
        results.append(result)
        counts = f"{result.count(True)} passed, {result.count(False)} failed"
        progress(f"      {result.status}: {counts}, {result.seconds:.0f} seconds")
        report.write(output, setting.folder, results, about)
    return results


def main(argv: list[str]) -> None:
    if argv[:1] == ["--child"]:
        child(argv[1:], POINTS)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [point.name for point in POINTS]
    parser.add_argument("--fake", action="store_true", help="run what works without a GPU")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs/gpu/results.json", help="JSON file to write"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="POINT", help=" ".join(names))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all points")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the times of a JSON file as Markdown"
    )
    args = parser.parse_args(argv)
    if args.table:
        print(report.markdown(json.loads(args.table.read_text())))
        return
    import torch

    if not args.fake and not torch.cuda.is_available():
        sys.exit("validate: PyTorch finds no GPU here; --fake runs what works without one")
    os.environ.update(ENVIRONMENT)
    asked = [point for point in POINTS if not args.only or point.name in args.only]
    points = [point for point in asked if (point.on_cpu if args.fake else point.on_cuda)]
    if not points:
        here = "a machine without a GPU" if args.fake else "a GPU"
        sys.exit(f"validate: --only {' '.join(args.only)}: nothing of it runs on {here}")
    with tempfile.TemporaryDirectory(prefix="validate-") as folder:
        setting = Setting("cpu" if args.fake else "cuda", Path(folder))
        results = run(points, setting, args.output, args.minutes)
        trace = setting.folder / "trace.json"
        if trace.is_file():
            args.output.with_suffix(".trace.json").write_bytes(trace.read_bytes())
    print(report.without_paths(report.table(results), Path(folder)))
    for point in asked:
        if point not in points:
            print(f"{point.name}: needs a {'GPU' if args.fake else 'CPU: --fake'}")
    bad = [result.point.name for result in results if result.bad]
    print(f"validate: failed: {', '.join(bad)}" if bad else "validate: passed", f"({args.output})")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main(sys.argv[1:])
