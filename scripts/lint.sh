#!/usr/bin/env bash
# Every rule that a machine can check. Each check runs even when an earlier one failed; the failed ones are named at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mantle/target}
bin=.venv/bin
cargo="--quiet --manifest-path proxy/Cargo.toml"
failed=()
check() {
    local name=$1 began=$SECONDS
    shift
    if "$@"; then printf 'lint: %-28s ok    %3d s\n' "$name" $((SECONDS - began)); else
        printf 'lint: %-28s FAILED\n' "$name"
        failed+=("$name")
    fi
}
# Shows the output of a command that fails, and nothing of one that passes.
quietly() {
    local output
    output=$("$@" 2>&1) || { printf '%s\n' "$output"; return 1; }
}
check "ruff" $bin/ruff check --quiet .
check "ruff format" $bin/ruff format --check --quiet .
check "mypy" $bin/mypy --no-error-summary
check "import contracts" quietly $bin/lint-imports
check "generated code" $bin/python scripts/gen.py --check
check "generated docs" $bin/python scripts/docs.py --check
check "house rules" $bin/python scripts/rules.py
check "rustfmt" cargo fmt --manifest-path proxy/Cargo.toml --all --check
check "clippy" cargo clippy $cargo --workspace --all-targets --locked -- -D warnings
if [ ${#failed[@]} -gt 0 ]; then
    echo "lint: failed: ${failed[*]}" >&2
    exit 1
fi
