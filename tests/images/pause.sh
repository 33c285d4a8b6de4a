#!/bin/bash
# A root file system of one static program and nothing else: catatonit, which Debian offers as a pod's pause.
# usage: pause.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

assemble() {
    unpack_package catatonit "$work/catatonit"
    mkdir "$work/root"
    cp "$work/catatonit/usr/bin/catatonit" "$work/root/pause"
}

tar=$cache/images/pause-$(hash_of "$here/pause.sh").tar
lock pause
if [ ! -f "$tar" ]; then
    scratch
    step "assembling the pause root" assemble
    step "packing it" pack_root "$work/root" "$work/tar"
    keep "$work/tar" "$tar"
fi
say "root: catatonit of Debian, $(stat -c %s "$tar" | numfmt --to=iec)"
echo "$tar"
