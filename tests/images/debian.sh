#!/bin/bash
# A root file system of Debian 12 (glibc), minimal, from the machine's own archive.
# usage: debian.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    need mmdebstrap
    mmdebstrap --variant=minbase --mode=root --format=directory bookworm "$work/root"
    # What differs from run to run and is of no use in a container.
    rm -rf "$work"/root/var/{cache/apt,lib/apt/lists,log,cache/ldconfig}/* "$work/root/etc/machine-id"
    : >"$work/root/etc/machine-id"
}

packed debian "Debian 12"
