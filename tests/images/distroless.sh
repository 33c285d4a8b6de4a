#!/bin/bash
# A root file system of glibc and a Rust program, without a shell, a package manager or a user root may become.
# usage: distroless.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    unpack_package libc6 "$work/libc6"
    unpack_package libgcc-s1 "$work/libgcc"
    local libraries=lib/x86_64-linux-gnu
    mkdir -p "$work/root/"{$libraries,lib64,etc,home/nonroot,tmp}
    chmod 1777 "$work/root/tmp"
    cp "$work"/libc6/$libraries/{libc.so.6,ld-linux-x86-64.so.2} "$work"/libgcc/$libraries/libgcc_s.so.1 "$work/root/$libraries/"
    ln -s ../$libraries/ld-linux-x86-64.so.2 "$work/root/lib64/"
    echo nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin >"$work/root/etc/passwd"
    echo nonroot:x:65532: >"$work/root/etc/group"
    program "$work/root/libc"
}

packed distroless "glibc of Debian and a Rust program" libc.rs
