#!/usr/bin/env bash
# Formats everything that has a formatter.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff check --fix-only --quiet .
.venv/bin/ruff format --quiet .
cargo fmt --manifest-path proxy/Cargo.toml --all
