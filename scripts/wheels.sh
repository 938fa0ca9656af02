#!/usr/bin/env bash
# Builds the wheels of both distributions:   scripts/wheels.sh [dist|release|dev] [DIRECTORY]
# `dist` (fat LTO) is what is published; the others package what `make install` has built already.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:-dist}
out=$(realpath -m "${2:-dist}")
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mantle/target}
export PATH=$PWD/.venv/bin:$PATH
# maturin gathers a wheel in the target directory, under one name: two at a time would meet there.
mkdir -p "$CARGO_TARGET_DIR"
exec 9>"$CARGO_TARGET_DIR/.wheels.lock"
flock 9
maturin build --quiet --locked --manifest-path proxy/Cargo.toml --profile "$profile" --out "$out"
hatchling build --target wheel --directory "$out" >/dev/null
ls "$out"/*.whl
