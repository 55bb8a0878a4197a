#!/usr/bin/env bash
# Collects the packages that validate.sh needs on a machine without a network, as wheels.
#
#   bash examples/gpu/collect_wheels.sh DIR [PYTHON_VERSION]
#
# DIR is the folder for the wheels. PYTHON_VERSION is the other machine's version, such as 3.12; the
# default is this machine's. The other machine needs PyTorch and the operating system and processor of
# this one.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
fail() { echo "collect_wheels.sh: $1" >&2; exit 1; }

[ $# -ge 1 ] && [ $# -le 2 ] || fail "usage: collect_wheels.sh DIR [PYTHON_VERSION]"
FOLDER=$1
PYTHON=$(command -v python || command -v python3) || fail "no Python on PATH"
VERSION=${2:-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
[[ $VERSION =~ ^3\.[0-9]+$ ]] || fail "PYTHON_VERSION $VERSION: must be like 3.12"
mkdir -p "$FOLDER"

PIP=("$PYTHON" -m pip --disable-pip-version-check)
for name in $(grep -v '^#' "$HERE/packages.txt"); do
    pin=$(grep -i "^$name==" "$HERE/../requirements.txt") || fail "$name: has no version"
    log=$("${PIP[@]}" download --quiet --no-deps --only-binary :all: --python-version "$VERSION" \
        --dest "$FOLDER" "$pin" 2>&1) && continue
    # Some packages have no wheel and are built. The check below makes sure that a built wheel runs on any
    # Python.
    built=$(mktemp -d)
    "${PIP[@]}" wheel --quiet --no-deps --wheel-dir "$built" "$pin" >&2 ||
        { echo "$log" >&2; fail "$pin: there is no wheel for Python $VERSION, and it cannot be built"; }
    wheel=$(ls "$built")
    [[ $wheel == *-none-any.whl ]] || fail "$pin: builds $wheel, which is for this Python alone"
    mv "$built/$wheel" "$FOLDER"
    rmdir "$built"
done
echo "$(ls "$FOLDER" | wc -l) wheels, $(du -sh "$FOLDER" | cut -f 1), in $FOLDER for Python $VERSION"
