#!/bin/bash
# Public test suites of file systems, built: pjdfstest tries what POSIX says of each call, fsx changes a file at random and
# compares. Linked statically, so that they run in a container of any image.
# usage: suites.sh     prints the folder of their programs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

suites=(pjdfstest@0.2.2 fsx@0.3.2)

build() {
    local target
    target=$(rustc -vV | sed -n 's/^host: //p')
    RUSTFLAGS='-C target-feature=+crt-static' CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=$work/target \
        cargo install --locked --debug --target "$target" --root "$work/root" "${suites[@]}"
}

dir=$cache/suites/$(hash_of "${suites[@]}")
lock suites
if [ ! -d "$dir" ]; then
    need gcc libc6-dev
    scratch
    step "building ${suites[*]}" build
    keep "$work/root/bin" "$dir"
fi
echo "$dir"
