#!/usr/bin/env bash
# Encodes texts with GPT-2's byte-level BPE (a dictionary of 51,200 entries) and binarises them for
# fairseq into OUTPUT/bin, and test sets of other domains into OUTPUT/domains. See
# examples/data/README.md.
#
#   bash examples/data/gpt2_bpe.sh OUTPUT --train FILE... --valid FILE... --test FILE... \
#       [--domain NAME FILE...]... [--workers N]
#
# A second run continues an interrupted one.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
paths=$PWD
cd "$root"
. examples/venv.sh
export OMP_NUM_THREADS=1
cd "$paths"
python -W ignore "$root/examples/data/gpt2_bpe.py" "$@"
