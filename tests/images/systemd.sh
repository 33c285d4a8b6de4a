#!/bin/bash
# A root file system of Debian 12 whose PID 1 is systemd, from the machine's own archive.
# usage: systemd.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    need mmdebstrap
    mmdebstrap --variant=minbase --mode=root --format=directory --include=systemd-sysv bookworm "$work/root"
    rm -rf "$work"/root/var/{cache/apt,lib/apt/lists,log/*.log,cache/ldconfig}/* "$work/root/etc/machine-id"
    : >"$work/root/etc/machine-id"
}

packed systemd "Debian 12 with systemd"
