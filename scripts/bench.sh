#!/usr/bin/env bash
# The proxy with fat LTO, beside its peers on the rig (bench/README.md). Needs root, and the programs named there.
# Arguments go to `bench/rig.py run`: scripts/bench.sh --tests h1_max --rounds 4
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mantle/target}
missing=()
for program in nginx nghttpd h2load wrk iperf3 haproxy ip nft openssl cc; do
    PATH=$PATH:/usr/sbin:/sbin command -v $program >/dev/null || missing+=($program)
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "the bench needs programs that this machine does not have: ${missing[*]} (bench/README.md says where from)" >&2
    exit 1
fi
cargo build --quiet --locked --manifest-path proxy/Cargo.toml --profile dist
# The pair runs as other users, who may not see the home that the build is in.
run=$(mktemp -d /var/tmp/mantle-bench-proxy.XXXXXX)
trap 'rm -rf "$run"' EXIT
chmod 755 "$run"
install -m 755 "$CARGO_TARGET_DIR/dist/mantle-proxy" "$run/"
variants=direct,relay-plain,haproxy-h2,haproxy-tcp,mantle
envoy=$(ls "${XDG_CACHE_HOME:-$HOME/.cache}"/mantle/bench/venv/lib/python*/site-packages/envoy/_bin/envoy 2>/dev/null || command -v envoy || true)
if [ -n "$envoy" ]; then variants+=,envoy-h2,envoy-tcp; fi
MANTLE_PROXY_BIN=$run/mantle-proxy .venv/bin/python bench/rig.py run --topology netns --variants $variants \
    ${envoy:+--envoy "$envoy"} --no-limits "$@"
