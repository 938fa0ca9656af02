#!/usr/bin/env bash
# Writes requirements.lock from pyproject.toml: every Python dependency (runtime and dev) with version and hashes.
# Run it after changing dependencies; `make install` then reads the lock with plain pip. Our own mantle-proxy is left
# out: it is built from proxy/, not fetched.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python - > "$work/requirements.in" <<'PY'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
print("\n".join(line for line in wanted if not line.startswith("mantle-proxy")))
PY
.venv/bin/pip install --quiet uv
.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --custom-compile-command "scripts/lock.sh" --output-file requirements.lock "$work/requirements.in"
echo "wrote requirements.lock: $(grep -c '^[a-z]' requirements.lock) packages"
