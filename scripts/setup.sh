#!/usr/bin/env bash
# Make the virtual environment .venv and install Manyeyes into it.
#   scripts/setup.sh VENV [GROUP]     GROUP: a dependency group of pyproject.toml to add (dev)
# Needs Python 3.11 to 3.13 (TensorFlow has no wheels for newer ones) and nothing else; no root.
set -euo pipefail
venv=$1
group=${2:-}
# Developers get the cluster engines too.
extras=${group:+cluster}
extras=${extras:-all}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python3.12 …" >&2
    exit 1
}

# Debian splits `venv` and `pip` off Python. Without them and without root, pip's own wheel out of Debian's package
# is enough to install pip into a bare environment.
pip_from_debian() {
    local python=$1 scratch wheel status=1
    scratch=$(mktemp -d)
    if "$python" scripts/debian_package.py python3-pip-whl "$scratch"; then
        wheel=$(find "$scratch" -name 'pip-*.whl' | head -n 1)
        [ -n "$wheel" ] && "$python" "$wheel/pip" install --quiet "$wheel"
        status=$?
    fi
    rm -rf "$scratch"
    return $status
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    rm -rf "$venv"
    if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
        rm -rf "$venv"
        if "$python" -m virtualenv --version >/dev/null 2>&1; then
            "$python" -m virtualenv --quiet "$venv"
        elif ! { "$python" -m venv --without-pip "$venv" && pip_from_debian "$venv/bin/python"; }; then
            echo "setup: $python can't make virtual environments. On Debian run: apt-get install python3-venv" >&2
            rm -rf "$venv"
            exit 1
        fi
    fi
fi

echo "setup: installing into $venv (a few minutes the first time: TensorFlow is large)" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[${extras}]" ${group:+--group "$group"}
