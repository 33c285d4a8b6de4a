#!/bin/bash
# The daemon of Docker 26 of Debian 13, unpacked: its containerd is that of ../containerd/containerd-1.7.sh.
# usage: docker-26.sh     prints the folder of its programs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

fetch() {
    unpack_from trixie "$work/root" docker.io
    "$work/root/usr/sbin/dockerd" --version | grep -F ' 26.'
}

dir=$cache/docker/26
lock docker-26
if [ ! -d "$dir" ]; then
    scratch
    step "fetching Docker 26 of Debian 13" fetch
    keep "$work/root/usr/sbin" "$dir"
fi
echo "$dir"
