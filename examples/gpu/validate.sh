#!/usr/bin/env bash
# Checks and measures the project on a GPU, in ten minutes: numbers against fp64, training, memory,
# times. Prints a table and writes one JSON file.
#
#   bash examples/gpu/validate.sh                        everything
#   bash examples/gpu/validate.sh --wheels DIR           installs from DIR, without a network
#   bash examples/gpu/validate.sh --fake                 what works without a GPU
#   bash examples/gpu/validate.sh --output FILE          default: runs/gpu/results.json
#   bash examples/gpu/validate.sh --only methods curves  some points
#
# It uses the installed PyTorch and never installs one. Missing packages are installed into
# runs/gpu/packages-VERSION. collect_wheels.sh makes DIR on a machine with a network.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
fail() { echo "validate: $1" >&2; exit 1; }

WHEELS=
ARGUMENTS=()
FAKE=
while [ $# -gt 0 ]; do
    # --flag=value is the same as --flag value.
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
        --wheels | --output)
            [ $# -ge 2 ] || fail "$1: needs a value"
            # Relative paths start at the caller's folder, and this script has changed folders.
            path=$2
            [[ $path == /* ]] || path=$CALLER/$path
            if [ "$1" = --wheels ]; then WHEELS=$path; else ARGUMENTS+=(--output "$path"); fi
            shift
            ;;
        --fake) FAKE=1; ARGUMENTS+=("$1") ;;
        --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
        *) ARGUMENTS+=("$1") ;;
    esac
    shift
done
[ -z "$WHEELS" ] || [ -d "$WHEELS" ] || fail "--wheels $WHEELS: is no folder"

PYTHON=
for candidate in python python3; do
    if command -v $candidate >/dev/null &&
        $candidate -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        PYTHON=$candidate
        break
    fi
done
[ -n "$PYTHON" ] || fail "no Python on PATH has PyTorch"
[ -n "$FAKE" ] || $PYTHON -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "PyTorch finds no GPU here; --fake runs what works without one"

PACKAGES=$PWD/runs/gpu/packages-$($PYTHON -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PYTHONPATH=$PACKAGES${PYTHONPATH:+:$PYTHONPATH}
MISSING=$($PYTHON - <<'END'
import importlib.metadata
from pathlib import Path

pins = {}
for line in Path("examples/requirements.txt").read_text().splitlines():
    if "==" in line:
        pins[line.partition("==")[0].lower()] = line
for name in Path("examples/gpu/packages.txt").read_text().splitlines():
    if name.startswith("#"):
        continue
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(pins[name.lower()])
END
)
if [ -n "$MISSING" ]; then
    echo "installing into $PACKAGES:" $MISSING
    FROM=()
    [ -z "$WHEELS" ] || FROM=(--no-index --find-links "$WHEELS")
    # --no-deps, as PyTorch is among the dependencies.
    $PYTHON -m pip --disable-pip-version-check install --quiet --no-deps "${FROM[@]}" \
        --target "$PACKAGES" $MISSING || fail "the packages that are missing cannot be installed"
fi
exec $PYTHON -W ignore examples/gpu/validate.py "${ARGUMENTS[@]}"
