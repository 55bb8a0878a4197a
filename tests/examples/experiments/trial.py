"""A table and a scale on a small corpus, for tests of ``experiments run``."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from experiments.__main__ import main
from experiments.data import fingerprint
from experiments.files import load_scale
from fairseq_sffn.tools.zero_shot_tasks import TASKS
from tests import commands

UPDATES = 8
AVGK = 'label = "Avg-K", model = "avgk", flags = "--sffn-block-size 8"'


class Trial:
    """A table and a scale in a folder, with the results of the command.

    Args:
        folder: folder of the files.
        data: binarised corpus.
        rows: rows of the table.
        rates: learning rates to choose from.
    """

    def __init__(self, folder: Path, data: Path, rows: str, rates: str = "[1e-2]") -> None:
        self.folder, self.data = folder, data
        self.table, self.scale = folder / "t.toml", folder / "small.toml"
        shutil.copytree(data, folder / "domains" / "law")
        self.table.write_text(f'title = "T"\nkind = "perplexity"\nrows = [{rows}]\n')
        flags = shlex.join(commands.SMALL)
        self.scale.write_text(
            f'size = "tiny"\ndata = "{data}"\ndomains = "{folder / "domains"}"\n'
            f"dictionary = {len(Dictionary.load(str(data / 'dict.txt')))}\nupdates = {UPDATES}\n"
            "batch_size = 8\ntokens_per_sample = 16\nffn_embed_dim = 32\nsweep_share = 0.5\n"
            f"learning_rates = {rates}\ntokens_per_second = 1000\n"
            f'flags = "--optimizer adam --cpu --num-workers 0 {flags}"\n'
        )

    @property
    def work(self) -> Path:
        """The folder of the runs."""
        scale = load_scale(self.scale)
        return self.folder / "work" / scale.name / fingerprint(scale)

    def run(self, *flags: str) -> None:
        """Run the command."""
        main(
            [
                *("run", str(self.table), "--scale", str(self.scale), "--jobs", "1"),
                *("--work", str(self.folder / "work"), *flags),
            ]
        )

    def ask_for_zero_shot(self, encoder: str = "--bpe characters") -> None:
        """Add zero-shot tasks to the table, with a file for each task."""
        self.table.write_text("zero_shot = true\n" + self.table.read_text())
        requests = self.folder / "requests"
        requests.mkdir()
        for task in TASKS:
            (requests / f"{task}.jsonl").touch()
        with self.scale.open("a") as scale:
            scale.write(f'requests = "{requests}"\nencoder = "{encoder}"\n')

    def results(self) -> dict[str, dict[str, Any]]:
        """Return key -> result."""
        folder = self.folder / "results" / "small"
        return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def trained(calls: list[list[str]]) -> int:
    """Return how many runs were trained."""
    return sum(call[0] == "fairseq_cli.train" for call in calls)
