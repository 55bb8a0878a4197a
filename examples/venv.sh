# Sourced by the shell scripts of examples/ and tests/ with the project root as the working directory:
# makes .venv if it is not there or its requirements changed, and activates it.

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

make_venv() {
    if cat examples/requirements.txt setup.py | cmp -s - .venv/made-from.txt; then return; fi
    echo "making .venv (two minutes, once)"
    local python
    python=$(python_for_venv)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    local pip=(.venv/bin/python -m pip --disable-pip-version-check)
    # ve-fairseq is installed without its dependencies, as torchaudio must not be installed
    # (requirements.txt says why).
    "${pip[@]}" install --quiet --requirement <(grep -v '^ve-fairseq==' examples/requirements.txt)
    "${pip[@]}" install --quiet --no-deps --requirement examples/requirements.txt
    "${pip[@]}" -qq uninstall --yes torchaudio
    "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
    # This is the last step, so that an interrupted installation is repeated.
    cat examples/requirements.txt setup.py >.venv/made-from.txt
}

make_venv
. .venv/bin/activate
