#!/usr/bin/env bash
# Runs every check: format, lint, types, tests. --fast runs the tests of the core only. Other arguments
# go to pytest. As root on Debian, it installs Slurm for the tests of clusters.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/venv.sh
if ! python -m pip freeze | grep --quiet --line-regexp --file <(grep -v '^#' tests/requirements.txt); then
    python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/requirements.txt
fi

if [ "${1-}" = --fast ]; then
    shift
    set -- -m "not slow and not integration and not distributed" "$@"
else
    packages=(slurm-wlm munge iproute2)
    installed() { [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/munged ] && command -v ip; }
    if ! installed >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${packages[*]}"
        export DEBIAN_FRONTEND=noninteractive
        { timeout 60 apt-get update && timeout 120 apt-get install --yes --no-install-recommends \
            "${packages[@]}"; } >/dev/null 2>&1 || true
    fi
    installed >/dev/null || echo "${packages[*]}: not all installed; tests of clusters are skipped"
fi

ruff format --check .
ruff check .
mypy
# A file's tests share what they train, so one worker runs a file. Files come in the order of
# conftest.py. By default, files with few tests would come last, and these take longest.
# One worker more than there are cores, as tests of clusters wait for hosts and jobs.
workers=$(($(nproc) < 8 ? $(nproc) + 1 : 8))
OMP_NUM_THREADS=1 python -m pytest --numprocesses "$workers" --dist loadfile \
    --no-loadscope-reorder --durations 10 "$@"
