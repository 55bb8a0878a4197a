#!/usr/bin/env bash
# Installs the project as .github/SUPPORT.md says with several versions of Python and PyTorch, and runs
# fast tests with each pair. A pair takes about ten minutes on two cores and up to 6 GB of disk.
#
#   bash tests/versions.sh                        all pairs of the table
#   bash tests/versions.sh 3.12 2.11              one pair, or several
#   bash tests/versions.sh --in FOLDER 3.12 2.11  keeps the environments in FOLDER, and reuses them
#
# pip's own settings choose the source of PyTorch: PIP_INDEX_URL may name an index of CPU builds.
set -uo pipefail
cd "$(dirname "$0")/.."

# Python, PyTorch
TABLE="
3.11 2.13
3.12 2.9
3.12 2.11
3.12 2.15
"
TESTS=(
    # Engines, selectors, models, optimizers
    tests/memory/test_*.py tests/memory/selectors
    tests/memory/compute/test_{chunks,engines,grouped_mm,sorted_assignments,tiles,tiled_products,triton_kernels}.py
    tests/models tests/optim tests/criterions tests/tasks
    # Checkpoints, commands, and what fairseq needs.
    tests/checkpoints/test_{reading,writing}.py tests/patches/test_{callers,registry}.py
    tests/integration/test_command_line.py::test_{training_learns,eval_lm_finds_the_perplexity_that_training_logged}
    tests/integration/test_scripts.py::test_script_trains_from_the_project_root
    # Expert parallelism with gloo
    tests/expert_parallel/test_{checkpoints,collectives,gradients,launch,memory,precision,uneven}.py
)

fail() { echo "versions.sh: $1" >&2; exit 2; }

folder=
if [ "${1-}" = --in ]; then
    [ -n "${2-}" ] || fail "--in needs a folder"
    mkdir -p "$2" && folder=$(cd "$2" && pwd) || fail "$2: cannot be made"
    shift 2
fi
[ $(($# % 2)) -eq 0 ] || fail "needs a Python and a PyTorch version for each pair"
mapfile -t pairs < <(if [ $# -gt 0 ]; then printf '%s %s\n' "$@"; else grep . <<<"$TABLE"; fi)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT

# find_python VERSION: finds a Python of a version on PATH or in pyenv. A shim on PATH may not work.
find_python() {
    local candidate
    for candidate in "python$1" "$(pyenv root 2>/dev/null)/versions/$1".*/bin/"python$1"; do
        if "$candidate" -c "" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

version_of() { "$1" -W ignore -c "import torch; print(torch.__version__)"; }

# install ENVIRONMENT PYTHON PYTORCH: installs into an environment, and prints errors.
install() {
    local before after pip=("$1/bin/python" -m pip --disable-pip-version-check)
    echo "making the environment: PyTorch" >&2
    [ -x "$1/bin/python" ] || "$2" -m venv "$1" >&2 || { echo "no environment was made"; return 1; }
    "${pip[@]}" install --quiet "torch==$3.*" >&2 || { echo "PyTorch was not installed"; return 1; }
    before=$(version_of "$1/bin/python")
    echo "making the environment: the project" >&2
    "${pip[@]}" install --quiet --editable ".[plots,tests]" >&2 || { echo "not installed"; return 1; }
    "${pip[@]}" --quiet uninstall --yes torchaudio >&2
    after=$(version_of "$1/bin/python")
    [ "$before" = "$after" ] || { echo "pip replaced PyTorch $before by $after"; return 1; }
}

# run_pair PYTHON PYTORCH: prints everything, and adds a row to $scratch/rows.
run_pair() {
    local python environment=${folder:-$scratch}/$1-$2 versions="$1 | $2" result status=1
    if ! python=$(find_python "$1"); then
        result="not run: no python$1 on PATH or in pyenv"
    elif result=$(install "$environment" "$python" "$2"); then
        versions=$("$environment/bin/python" -W ignore -c \
            "import platform, torch; print(platform.python_version(), '|', torch.__version__)")
        OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest --numprocesses auto --maxprocesses 8 \
            --dist loadfile -p no:cacheprovider "${TESTS[@]}" | tee "$scratch/tests"
        status=$?
        result=$(tail -n 1 "$scratch/tests" | sed 's/, [0-9]* warnings*//')
    fi
    [ -n "$folder" ] || rm -rf "$environment"
    echo "| $(date +%F) | $versions | $result |" | tee -a "$scratch/rows"
    return $status
}

status=0
for pair in "${pairs[@]}"; do
    read -r python pytorch <<<"$pair"
    echo "== Python $python, PyTorch $pytorch"
    run_pair "$python" "$pytorch" || status=1
done
echo
cat "$scratch/rows"
exit $status
