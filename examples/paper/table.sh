#!/usr/bin/env bash
# Trains, evaluates and prints tables; the other scripts in this folder call it.
#
#   bash examples/paper/main.sh                     at laptop scale, on the cores there are
#   SCALE=paper bash examples/paper/main.sh         the paper's models, on eight GPUs
#   SCALE=paper bash examples/paper/main.sh --launcher slurm     on eight nodes a run, with Slurm
#   SCALE=paper bash examples/paper/main.sh --dry-run            trains nothing, checks everything
#
# Finished runs are skipped and interrupted runs are resumed.
set -euo pipefail
cd "$(dirname "$0")/../.."
SCALE=${SCALE:-laptop}
FILE=examples/paper/scales/$SCALE.toml
[ -e "$FILE" ] || { echo "SCALE=$SCALE: there is no $FILE" >&2; exit 1; }
. examples/venv.sh

tables=() names=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
    tables+=("examples/paper/$1.toml") names+=("$1")
    shift
done
# glibc keeps the memory of large tensors, in large pages. Otherwise it is returned and allocated again
# at each update, which takes a fifth of a run's time on a CPU.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=4000000000:glibc.malloc.mmap_threshold=4000000000}
python examples/experiments run "${tables[@]}" --scale "$FILE" "$@"
case " $* " in
    *" --dry-run "* | *" --help "* | *" -h "* | *" --only"[\ =]*) exit ;;
esac
results=()
while [ $# -gt 0 ]; do
    case $1 in
        --results) results=(--results "$2") ;;
        --results=*) results=("$1") ;;
    esac
    shift
done
python examples/experiments report examples/paper --scale "$FILE" --tables "${names[@]}" "${results[@]}"
