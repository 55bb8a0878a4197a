# Sourced by the shell scripts of examples/ and tests/, or by hand, from any folder: makes .venv in this
# project's root if it is not there or its requirements changed, and activates it. If that fails, the
# status is not 0 and nothing is activated. Shells other than bash source it in the root.

project_root() {
    CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-examples/venv.sh}")/.." && pwd
}

python_for_venv() {
    for candidate in python3.11 python3.12 python3; do
        # A name on PATH may be a shim without a Python, as with pyenv.
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or 3.12 on PATH: the versions that this project is tested with" >&2
    return 1
}

# The steps are joined by &&: the shell that sources this file need not have set -e.
make_venv() (
    cd -- "$1" || exit
    if cat examples/requirements.txt setup.py | cmp -s - .venv/made-from.txt; then exit; fi
    echo "making .venv (two minutes, once)"
    python=$(python_for_venv) || exit
    pip=(.venv/bin/python -m pip --disable-pip-version-check)
    # ve-fairseq is installed without its dependencies, as torchaudio must not be installed
    # (requirements.txt says why). made-from.txt is written last, so that an interrupted installation
    # is repeated.
    { [ -x .venv/bin/python ] || "$python" -m venv .venv; } &&
        "${pip[@]}" install --quiet --requirement <(grep -v '^ve-fairseq==' examples/requirements.txt) &&
        "${pip[@]}" install --quiet --no-deps --requirement examples/requirements.txt &&
        "${pip[@]}" -qq uninstall --yes torchaudio &&
        "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable . &&
        cat examples/requirements.txt setup.py >.venv/made-from.txt
)

make_venv "$(project_root)" && . "$(project_root)/.venv/bin/activate"
