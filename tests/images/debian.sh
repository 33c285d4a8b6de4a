#!/bin/bash
# A root file system of Debian 12 (glibc), minimal, from the machine's own archive.
# usage: debian.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

bootstrap() {
    mmdebstrap --variant=minbase --mode=root --format=directory bookworm "$work/root"
    # What differs from run to run and is of no use in a container.
    rm -rf "$work"/root/var/{cache/apt,lib/apt/lists,log,cache/ldconfig}/* "$work/root/etc/machine-id"
    : >"$work/root/etc/machine-id"
}

tar=$cache/images/debian-$(hash_of "$here/debian.sh").tar
lock debian
if [ ! -f "$tar" ]; then
    need mmdebstrap
    scratch
    step "installing a minimal Debian" bootstrap
    step "packing it" pack_root "$work/root" "$work/tar"
    keep "$work/tar" "$tar"
fi
say "root: Debian $(tar -xOf "$tar" ./etc/debian_version), $(stat -c %s "$tar" | numfmt --to=iec)"
echo "$tar"
