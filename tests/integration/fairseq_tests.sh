#!/usr/bin/env bash
# Runs fairseq's own tests on the installed fairseq, without and with the plugin. Prints the tests that
# pass only without it. If there are any, the exit status is 1.
#
#   bash tests/integration/fairseq_tests.sh FOLDER                          all that need no GPU, an hour
#   bash tests/integration/fairseq_tests.sh FOLDER tests/test_train.py ...  some files
#
# FOLDER is a checkout of fairseq.
set -euo pipefail
fail() { echo "fairseq_tests.sh: $1" >&2; exit 2; }

[ $# -ge 1 ] || fail "needs a checkout of fairseq"
[ -e "$1/tests/test_train.py" ] || fail "$1: is no checkout of fairseq"
checkout=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
. examples/venv.sh
export PYTHONPATH=$PWD OMP_NUM_THREADS=1

# The checkout's own fairseq would be imported in place of the installed one.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for name in tests scripts examples; do cp -R "$checkout/$name" "$scratch"; done
cd "$scratch"
if [ $# -eq 0 ]; then
    mapfile -t files < <(find tests -name 'test_*.py' -not -path 'tests/gpu/*' | sort)
    set -- "${files[@]}"
fi

# passed ARGUMENTS...: prints the names of the tests that pass.
passed() {
    python -W ignore -m pytest -p no:cacheprovider --tb=no -rp "$@" 2>/dev/null |
        sed -n 's/^PASSED //p' | sort || true
}

number=0 all=0
for file in "$@"; do
    [ -e "$file" ] || fail "$file: is not in $checkout"
    passed "$file" >without
    count=$(wc -l <without)
    all=$((all + count))
    : >with
    if [ "$count" -gt 0 ]; then passed -p fairseq_sffn.plugin @without >with; fi
    echo "$file: $count pass without the plugin, $(wc -l <with) of them with it"
    comm -23 without with | sed 's/^/    only without: /'
    number=$((number + $(comm -23 without with | wc -l)))
done
[ $all -gt 0 ] || fail "no test passes without the plugin"
[ $number -eq 0 ] || { echo "$number tests pass without the plugin only"; exit 1; }
