# Sourced by the other scripts: finds what Mantle needs on this machine and says in one sentence what is missing.
# Sets PYTHON to a Python of at least 3.11 that can make virtual environments.

preflight() {
    local missing=() candidate
    command -v git >/dev/null || missing+=("git")
    command -v make >/dev/null || missing+=("make")
    command -v cc >/dev/null || missing+=("a C compiler (cc)")
    command -v cargo >/dev/null || missing+=("Rust (cargo, from rustup or your distribution)")
    PYTHON=""
    for candidate in "${MANTLE_PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            PYTHON=$(command -v "$candidate")
            break
        fi
    done
    if [ -z "$PYTHON" ]; then
        missing+=("Python 3.11 or newer (python3)")
    elif ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
        missing+=("Python's venv module (on Debian: apt-get install python3-venv)")
    fi
    if [ "$(uname -s)" != Linux ]; then
        missing+=("Linux (this is $(uname -s))")
    elif [ "$(id -u)" != 0 ] && [ -n "$PYTHON" ] && ! user_namespaces; then
        missing+=("root, or permission to make user namespaces (kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0)")
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        local sentence=${missing[0]} item
        for item in "${missing[@]:1}"; do sentence+="; $item"; done
        echo "Mantle needs what this machine does not have: $sentence." >&2
        return 1
    fi
}

# Makes a user namespace in a child that ends at once.
user_namespaces() {
    "$PYTHON" -c 'import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)' 2>/dev/null
}
