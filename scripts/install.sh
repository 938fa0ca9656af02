#!/usr/bin/env bash
# Leaves .venv/bin/mantle and .venv/bin/mantle-proxy in the checkout. Safe to run again: what is current is not redone.
#   scripts/install.sh [release|dev|dist]     the cargo profile of the proxy; release (thin LTO) is what users run
# Builds go to the user's cache directory, so a fresh clone does not start over.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/preflight.sh
preflight

profile=${1:-release}
venv=.venv
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mantle/target}
export PIP_DISABLE_PIP_VERSION_CHECK=1
say() { echo "mantle: $*" >&2; }

# 1. The environment, from the lock: every package by version and hash.
stamp=$(cat requirements.lock pyproject.toml src/mantle/__init__.py | sha256sum | cut -c1-64)
if [ "$(cat $venv/.mantle-stamp 2>/dev/null)" != "$stamp" ]; then
    [ -x $venv/bin/python ] || { say "making the virtual environment ($PYTHON)"; "$PYTHON" -m venv $venv; }
    say "installing the locked Python packages"
    $venv/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
    $venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
    $venv/bin/python -m compileall -q src apps  # pods may not write beside the sources, and would compile at each start
    echo "$stamp" > $venv/.mantle-stamp
fi

# 2. The proxy. Cargo says what it builds; nothing to do takes a fraction of a second.
built=$CARGO_TARGET_DIR/$profile/mantle-proxy
[ "$profile" = dev ] && built=$CARGO_TARGET_DIR/debug/mantle-proxy
[ -e "$built" ] || say "building mantle-proxy ($profile): the first build takes some minutes on two cores"
cargo build --manifest-path proxy/Cargo.toml --package mantle-proxy --locked --profile "$profile"
$venv/bin/python scripts/proxy_dist.py "$built"
echo "$profile" > $venv/.mantle-profile
