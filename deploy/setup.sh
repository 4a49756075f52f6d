#!/bin/sh
# Build the environment in $1 exactly as requirements.lock says. Needs python3 (3.11 to 3.13); a Debian without
# python3-venv gets it by apt-get when we are root. PYTHON names another interpreter.
set -eu
venv=$1
uv_version='uv>=0.8,<1'

fail() {
    echo "setup: $*" >&2
    exit 1
}

usable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Distributions build their interpreter with profile-guided optimization; one compiled by hand or by a version
# manager often is not, and runs the same code about 30 % slower. So the system's comes first, if it can make
# environments as it is.
ready() {
    usable "$1" && "$1" -c 'import ensurepip, venv' 2>/dev/null
}

make_environment() {
    python=
    if [ -n "${PYTHON:-}" ]; then
        if usable "$PYTHON"; then python=$PYTHON; fi
    elif ready /usr/bin/python3; then
        python=/usr/bin/python3
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if [ -z "$python" ] && usable "$candidate"; then
            python=$candidate
        fi
    done
    [ -n "$python" ] || fail "expected Python 3.11, 3.12 or 3.13, got $("${PYTHON:-python3}" --version 2>&1); set PYTHON"
    rm -rf "$venv"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif command -v uv >/dev/null 2>&1; then
        uv venv -q --python "$python" "$venv"
    elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "setup: installing python3-venv"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -qq && apt-get install -y -qq python3-venv; } </dev/null >/dev/null ||
            fail "apt-get could not install python3-venv"
        "$python" -m venv "$venv"
    else
        fail "$python cannot make environments: install python3-venv (apt-get install python3-venv) or uv"
    fi
}

began=$(date +%s)
if ! [ -x "$venv/bin/python" ] || ! usable "$venv/bin/python"; then
    echo "setup: making the environment $venv"
    make_environment
fi
if command -v uv >/dev/null 2>&1; then
    uv=uv
else
    # Beside the environment's own packages: syncing would remove it from among them.
    uv=$venv/.uv/bin/uv
    [ -x "$uv" ] || "$venv/bin/python" -m pip install -q --disable-pip-version-check --target "$venv/.uv" "$uv_version"
fi
echo "setup: installing what requirements.lock names"
# Compiled here once, on all cores: else the first start compiles in twenty processes at the same time.
"$uv" pip sync -q --compile-bytecode -p "$venv/bin/python" requirements.lock
# The Python client, in place, as its users install it: `carillon` and `import carillon_client`. uv builds it by itself and its
# dependencies are in the lock: nothing is asked for.
"$uv" pip install -q --no-deps --no-index -p "$venv/bin/python" -e clients/python
echo "setup: done in $(($(date +%s) - began)) s"
