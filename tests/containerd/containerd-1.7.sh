#!/bin/bash
# containerd 1.7 of Debian 13, unpacked beside this machine's own containerd.
# usage: containerd-1.7.sh     prints the folder of its programs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

fetch() {
    unpack_from trixie "$work/root" containerd
    "$work/root/usr/bin/containerd" --version | grep -F ' 1.7.'
}

dir=$cache/containerd/1.7
lock containerd-1.7
if [ ! -d "$dir" ]; then
    scratch
    step "fetching containerd 1.7 of Debian 13" fetch
    keep "$work/root/usr/bin" "$dir"
fi
echo "$dir"
