#!/usr/bin/env bash
# Measures how fast sparse FFN layers are, against dense ones and other libraries. It takes about 45
# minutes on 2 cores, which should be idle otherwise.
#
#   bash examples/benchmark.sh                           everything
#   bash examples/benchmark.sh --force                   everything again
#   BENCHMARK_REPEATS=2 bash examples/benchmark.sh       fewer repeats (default 20)
#   BENCHMARK_PARTS="layer decode" bash examples/benchmark.sh   some of the parts
#       layer memory selection train_step processes decode scaling tables peers
#
# Results are in runs/benchmark: results.json, table.md, scaling.png. A second run reuses parts that
# were measured with the same settings and code.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/venv.sh

ALL="layer memory selection train_step processes decode scaling tables peers"
REPEATS=${BENCHMARK_REPEATS:-20}
[[ $REPEATS =~ ^[1-9][0-9]*$ ]] ||
    { echo "BENCHMARK_REPEATS=$REPEATS: must be a positive whole number" >&2; exit 1; }
PARTS=${BENCHMARK_PARTS:-$ALL}
for name in $PARTS; do
    [[ " $ALL " == *" $name "* ]] ||
        { echo "BENCHMARK_PARTS: $name is none of $ALL" >&2; exit 1; }
done
FORCE=
case "${1:-}" in
    "") ;;
    --force) FORCE=--force ;;
    *) echo "$1: is unknown; there is --force" >&2; exit 1 ;;
esac
COMMAND="BENCHMARK_REPEATS=$REPEATS BENCHMARK_PARTS=\"$PARTS\" bash examples/benchmark.sh"
RUNS=runs/benchmark
VENV=$RUNS/peers-venv
mkdir -p $RUNS/parts
export KINETO_LOG_LEVEL=6  # otherwise memory.py's profiler logs each start and stop

# measure PYTHON NAME THREADS SCRIPT ARGUMENTS...: measures a part in a new process, so that its number of
# threads is set from the start.
measure() {
    local python=$1 name=$2 threads=$3 script=$4
    shift 4
    echo "== $name, threads: $threads"
    OMP_NUM_THREADS=$threads "$python" -W ignore "examples/benchmark/$script.py" "$@" $FORCE \
        --output "$RUNS/parts/$name-$threads.json" --repeats "$REPEATS" --threads "$threads"
}

# Slow rows are left out, as they would take most of the time. Only the smallest size with one thread
# has each method with every block size. The largest size, and the middle one with two threads, have
# the methods that take a few times as long as dense.
layer() {
    measure python layer-2048x256 1 layer --tokens 2048 --width 256 --rows all
    measure python layer-2048x256 2 layer --tokens 2048 --width 256 --rows defaults
    measure python layer-glu-2048x256 1 layer --tokens 2048 --width 256 --rows main --glu silu
    measure python layer-glu-2048x256 2 layer --tokens 2048 --width 256 --rows main --glu silu
    measure python layer-4096x1024 1 layer --tokens 4096 --width 1024 --rows main
    measure python layer-2048x512 1 layer --tokens 2048 --width 512 --rows defaults
    measure python layer-2048x512 2 layer --tokens 2048 --width 512 --rows main
    measure python layer-4096x1024 2 layer --tokens 4096 --width 1024 --rows main
}

# peers.py reports libraries that cannot be installed.
peers_venv() {
    local pins=examples/benchmark/peers-requirements.txt
    local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
    if cmp -s $pins $VENV/made-from.txt; then return; fi
    echo "making $VENV (three minutes, once)"
    [ -x $VENV/bin/python ] || "$(python_for_venv)" -m venv $VENV
    "${pip[@]}" "$(grep '^torch==' examples/requirements.txt)"
    local missing=0
    for pin in $(sed '/^# What these need/,$d; /^#/d' $pins); do
        "${pip[@]}" --constraint $pins "$pin" || { echo "not installable: $pin" >&2; missing=1; }
    done
    # The next run tries again, since a network can fail.
    [ $missing = 1 ] || cp $pins $VENV/made-from.txt
}

for name in $PARTS; do
    case $name in
        layer) layer ;;
        processes) measure python processes 1 processes ;;  # starts two processes with 1 thread each
        peers) peers_venv; measure $VENV/bin/python peers 1 peers ;;
        *) measure python "$name" 1 "$name" ;;
    esac
done

echo "== results: $RUNS/results.json, $RUNS/table.md, $RUNS/scaling.png"
python -W ignore examples/benchmark/report.py --runs $RUNS --command "$COMMAND"
