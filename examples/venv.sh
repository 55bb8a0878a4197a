# Sourced by quickstart.sh and tests/run.sh with the project root as the working directory: makes
# .venv if it is not there or its requirements changed, and activates it.

python_for_venv() {
    for candidate in python3.11 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 on PATH: the version that this project is tested with" >&2
    return 1
}

make_venv() {
    if cat examples/requirements.txt setup.py | cmp -s - .venv/made-from.txt; then return; fi
    echo "making .venv (two minutes, once)"
    local python
    python=$(python_for_venv)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    local pip=(.venv/bin/python -m pip --disable-pip-version-check)
    # ve-fairseq comes without its dependencies: torchaudio must not (requirements.txt says why).
    "${pip[@]}" install --quiet --requirement <(grep -v '^ve-fairseq==' examples/requirements.txt)
    "${pip[@]}" install --quiet --no-deps --requirement examples/requirements.txt
    "${pip[@]}" -qq uninstall --yes torchaudio
    "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
    # Last, so that an interrupted installation is taken up again.
    cat examples/requirements.txt setup.py >.venv/made-from.txt
}

make_venv
. .venv/bin/activate
