#!/bin/bash
# A root file system of Debian 12 with Docker, from the machine's own archive.
# usage: docker.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    need mmdebstrap
    mmdebstrap --variant=minbase --mode=root --format=directory --include=docker.io bookworm "$work/root"
    rm -rf "$work"/root/var/{cache/apt,lib/apt/lists,log/*.log,cache/ldconfig}/* "$work"/root/usr/share/{doc,man,locale} \
        "$work/root/etc/machine-id"
    : >"$work/root/etc/machine-id"
}

packed docker "Debian 12 with Docker"
