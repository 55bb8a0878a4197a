"""Trains runs as an array of Slurm jobs, and follows the jobs."""

import getpass
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_sffn.errors import UsageError

from .plan import Run
from .processes import last_words
from .progress import Progress, summary
from .results import is_done
from .training import Training, last_section

POLL_SECONDS = 10
"""Time between two looks at the queue."""
GONE = "GONE"
"""State of a job that Slurm does not know."""
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT", GONE),
}
"""States of a job that does not run any more."""
SCRIPT = """\
#!/bin/bash
#SBATCH --requeue --open-mode append --signal B:USR1@300
{header}
keys=({keys})
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
trap 'kill -TERM $!; wait $!; scontrol requeue $job; exit' USR1
{command} --only "${{keys[SLURM_ARRAY_TASK_ID]}}" &
wait $!
"""
"""A job calls this command for its run alone. Before its time is over, it gets SIGUSR1. Then the
training saves, and the job waits for further time."""


@dataclass
class Slurm(Training):
    """Trains runs as Slurm jobs.

    The jobs go on when this command ends. It finds them again by the file ``job`` in the folder of
    each run.
    """

    again: Sequence[str]  # arguments of this command

    @property
    def name(self) -> str:
        """Name of all jobs."""
        return f"experiments-{self.scale.name}"

    @property
    def goes_on(self) -> str:
        """What happens to the jobs when this command is stopped, in words."""
        follow = "the jobs go on, and the same command follows them"
        return f"{follow}; scancel --name {self.name} ends them"

    def run(self, runs: Sequence[Run], sweep: bool, zero_shot: Container[Run] = ()) -> None:
        """Submit the runs that are not in the queue, and wait for the results of all; see
        :meth:`Runner.run`."""
        jobs = self.submitted(runs)
        new = [run for run in runs if run not in jobs]
        if jobs:
            print(f"{len(jobs)} runs have jobs already", flush=True)
        if new:
            jobs |= self.submit(new)
        sections = {run: last_section(sweep, run in zero_shot) for run in runs}
        if failures := self.follow(jobs, sections):
            raise UsageError(summary(failures, runs))

    def submitted(self, runs: Sequence[Run]) -> dict[Run, str]:
        """Return run -> job for the runs whose jobs wait or run."""
        files = {run: self.folder(run) / "job" for run in runs}
        jobs = {run: file.read_text() for run, file in files.items() if file.exists()}
        states = self.states() if jobs else {}
        return {run: job for run, job in jobs.items() if states.get(job, GONE) not in ENDED}

    def submit(self, runs: Sequence[Run]) -> dict[Run, str]:
        """Submit an array with a job for each run, and return run -> job."""
        folder = self.work.absolute() / "jobs"
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "array.sh"
        script.write_text(self.script(runs))
        limit = f"%{self.launcher.at_once}" if self.launcher.at_once else ""
        flags = ["--parsable", "--job-name", self.name, "--output", f"{folder}/%A_%a.log"]
        flags += ["--array", f"0-{len(runs) - 1}{limit}"]
        said = call([*shlex.split(self.launcher.submit), *flags, str(script)])
        number = said.strip().partition(";")[0]
        jobs = {run: f"{number}_{task}" for task, run in enumerate(runs)}
        for run, job in jobs.items():
            self.folder(run).mkdir(exist_ok=True)
            (self.folder(run) / "job").write_text(job)
        print(f"job array {number}: {len(runs)} runs", flush=True)
        return jobs

    def script(self, runs: Sequence[Run]) -> str:
        """Return the batch script of an array."""
        words = [sys.executable, "-W", "ignore", str(Path(__file__).parent), *self.again]
        return SCRIPT.format(
            header="\n".join(self.launcher.header),
            keys=" ".join(run.key(self.scale) for run in runs),
            command=shlex.join(words),
        )

    def states(self) -> dict[str, str]:
        """Return job -> state of all jobs that Slurm knows. It forgets jobs that have ended."""
        words = ["squeue", "--noheader", "--user", getpass.getuser(), "--name", self.name]
        said = call([*words, "--states", "all", "--array", "--format", "%F_%K %T"])
        return dict(line.split(maxsplit=1) for line in said.splitlines())

    def follow(self, jobs: dict[Run, str], sections: dict[Run, str]) -> list[str]:
        """Show the progress of all jobs until they have ended, and return the failures.

        Args:
            jobs: run -> job.
            sections: run -> section that its result will have.
        """
        failures: list[str] = []
        waiting, started, suspects = dict(jobs), set[Run](), set[Run]()
        with Progress(list(jobs), self.scale, self.work, later=True) as progress:
            interval = max(POLL_SECONDS, progress.interval)
            while waiting:
                try:
                    states = self.states()
                except UsageError as error:  # a controller that restarts
                    progress.bar.write(f"{error}; trying again")
                    time.sleep(interval)
                    continue
                for run, job in list(waiting.items()):
                    state = states.get(job, GONE)
                    if state == "RUNNING":
                        started.add(run)
                    if state not in ENDED:
                        suspects.discard(run)
                    elif (done := self.has(run, sections[run])) or run in suspects:
                        del waiting[run]
                        failure = "" if done else self.failure(job, state)
                        failures += [failure] if failure else []
                        progress.say(run, failure)
                    else:  # a file that another machine has written may come late
                        suspects.add(run)
                progress.show(jobs.keys() - waiting.keys(), started)
                if waiting:
                    time.sleep(interval)
        return failures

    def has(self, run: Run, section: str) -> bool:
        """Return whether the result of a run has a section by now."""
        self.results.refresh(run)
        return is_done(self.results.get(run) or {}, section)

    def failure(self, job: str, state: str) -> str:
        """Return in one line how a job ended without a result."""
        log = self.work / "jobs" / f"{job}.log"
        ended = "is gone from the queue" if state == GONE else f"ended as {state}"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return f"{log}: job {job} {ended}, without a result: {last_words(lines)}"


def own_job() -> str:
    """Return the Slurm job that this process belongs to; empty if there is none.

    One job of an array has the number of the array, which names all. Jobs are named by their place.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def call(words: list[str]) -> str:
    """Run a command of Slurm and return what it prints."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise UsageError(f"{words[0]}: cannot be run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [""])[-1]
        raise UsageError(f"{words[0]}: {reason}") from error
