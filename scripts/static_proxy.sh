#!/usr/bin/env bash
# Builds mantle-proxy as one static binary, for images on an empty base, and prints its path.
#   scripts/static_proxy.sh [release|dev|dist]
# The C library is linked in (glibc; names are asked of DNS without its plugins). Paths of this machine stay out of the
# binary, so two machines with the same toolchain make the same bytes. A target directory of its own: the flags differ.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:-release}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mantle/target-static
host=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=$cache
export RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo --remap-path-prefix=$cache=/target"
directory=$profile
[ "$profile" = dev ] && directory=debug
built=$cache/$host/$directory/mantle-proxy
[ -e "$built" ] || echo "mantle: building the static mantle-proxy ($profile): some minutes on two cores, once" >&2
cargo build --quiet --manifest-path proxy/Cargo.toml --package mantle-proxy --locked --profile "$profile" --target "$host"
echo "$built"
