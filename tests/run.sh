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
elif [ "$(id -u)" = 0 ] && [ ! -x /usr/sbin/slurmctld ] && command -v apt-get >/dev/null; then
    packages=(slurm-wlm munge iproute2)
    echo "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if ! { timeout 60 apt-get update && timeout 120 apt-get install --yes --no-install-recommends \
        "${packages[@]}"; } >/dev/null 2>&1; then
        echo "${packages[*]}: cannot be installed; the tests of clusters are skipped"
    fi
fi

ruff format --check .
ruff check .
mypy
# A file's tests share what they train, so one worker runs a file. Files come in the order of
# conftest.py. By default, files with few tests would come last, and these take longest.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
    --no-loadscope-reorder --durations 10 "$@"
