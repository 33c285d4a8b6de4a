#!/bin/bash
# Build ampoule-agent for the guest: one static program, small. Prints its path.
# usage: build.sh     CARGO_TARGET_DIR says where to build
set -euo pipefail
cd "$(dirname "$0")/.."

target=x86_64-unknown-linux-musl
if ! { rustup target list --installed 2>/dev/null || true; } | grep -qx $target; then
    # glibc does as well: the agent asks it for no names (NSS), the one thing it cannot do statically.
    target=x86_64-unknown-linux-gnu
fi

find_libseccomp() {
    find /usr/lib /usr/lib64 /usr/local/lib -name libseccomp.a -printf '%h\n' 2>/dev/null | head -n 1
}
libseccomp=$(find_libseccomp)
if [ -z "$libseccomp" ]; then
    { apt-get install -y --no-install-recommends libseccomp-dev ||
        { apt-get update && apt-get install -y --no-install-recommends libseccomp-dev; }; } >&2
    libseccomp=$(find_libseccomp)
fi

# --target keeps the flags from build scripts and procedural macros.
LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$libseccomp \
    RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build --locked --quiet --profile agent --target $target -p ampoule-agent >&2
agent=${CARGO_TARGET_DIR:-target}/$target/agent/ampoule-agent
! readelf -l "$agent" | grep -q INTERP || { echo "$agent is not static" >&2; exit 1; }
realpath "$agent"
