"""Copies a fairseq-train log from stdin to a file, and prints a short line for each record."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

RECORD = re.compile(r"\| INFO \| (train_inner|valid) \| (\{.*\})$")


class Progress:
    """The progress of a training.

    Args:
        updates: updates of the whole run.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.seconds: list[float] = []  # seconds per update, of each record

    def summary(self, line: str) -> str | None:
        """Return a short line for a log line with --log-format json; ``None`` if there is nothing
        to show."""
        match = RECORD.search(line.rstrip())
        if match is None:
            return None
        record = json.loads(match[2])
        if match[1] == "valid":
            return f"update {record['valid_num_updates']}: valid perplexity {record['valid_ppl']}"
        done, speed = int(record["num_updates"]), float(record["wps"])
        # The mean over records includes validations: fairseq counts them in the next record.
        self.seconds.append(float(record["wpb"]) / speed)
        left = round((self.updates - done) * statistics.fmean(self.seconds))
        return (
            f"update {done}/{self.updates}: perplexity {record['ppl']}, {speed:,.0f} tokens/s, "
            f"{left // 60}:{left % 60:02} left"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True, help="file to append the log to")
    parser.add_argument("--name", required=True, help="printed at the start of each line")
    parser.add_argument("--updates", type=int, required=True, help="updates of the whole run")
    args = parser.parse_args()
    progress = Progress(args.updates)
    with args.log.open("a", encoding="utf-8") as log:
        for line in sys.stdin:
            log.write(line)
            log.flush()
            if (text := progress.summary(line)) is not None:
                print(f"{args.name}: {text}", flush=True)


if __name__ == "__main__":
    main()
