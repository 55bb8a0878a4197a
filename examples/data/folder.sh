#!/usr/bin/env bash
# Builds OUTPUT from a folder of UTF-8 text files: cleaned, without copies, split by file, encoded
# with its own SentencePiece model and binarised for fairseq. See examples/data/README.md.
#
#   bash examples/data/folder.sh FOLDER OUTPUT [--pieces 4096] [--valid-share 0.03] ...
#
# A second run continues an interrupted one.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
paths=$PWD
cd "$root"
. examples/venv.sh
export OMP_NUM_THREADS=1
cd "$paths"
python -W ignore "$root/examples/data/folder.py" "$@"
