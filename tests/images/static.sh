#!/bin/bash
# A root file system of one static Rust program and nothing else, as of an image made `FROM scratch`.
# usage: static.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    mkdir "$work/root"
    program "$work/root/libc" -C target-feature=+crt-static
}

packed static "a static Rust program" libc.rs
