"""Copies a fairseq-train log from stdin to a file, and prints a short line for each record."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

RECORD = re.compile(r"\| INFO \| (train_inner|valid) \| (\{.*\})$")


def summary(line: str, updates: int) -> str | None:
    """Return a short line for a log line with --log-format json; ``None`` if there is nothing to
    show."""
    match = RECORD.search(line.rstrip())
    if match is None:
        return None
    record = json.loads(match[2])
    if match[1] == "valid":
        return f"update {record['valid_num_updates']}: valid perplexity {record['valid_ppl']}"
    speed = float(record["wps"])
    done = f"update {record['num_updates']}/{updates}"
    return f"{done}: perplexity {record['ppl']}, {speed:,.0f} tokens/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True, help="file to append the log to")
    parser.add_argument("--name", required=True, help="printed at the start of each line")
    parser.add_argument("--updates", type=int, required=True, help="updates of the whole run")
    args = parser.parse_args()
    with args.log.open("a", encoding="utf-8") as log:
        for line in sys.stdin:
            log.write(line)
            log.flush()
            if (text := summary(line, args.updates)) is not None:
                print(f"{args.name}: {text}", flush=True)


if __name__ == "__main__":
    main()
