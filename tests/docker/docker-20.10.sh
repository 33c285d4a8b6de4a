#!/bin/bash
# Docker 20.10 of Debian 12, unpacked: installed, its daemon would be started on this machine.
# usage: docker-20.10.sh     prints the folder it is unpacked in
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

fetch() {
    unpack_from bookworm "$work/root" docker.io
    "$work/root/usr/sbin/dockerd" --version | grep -F ' 20.10.'
}

dir=$cache/docker/20.10
lock docker-20.10
if [ ! -d "$dir" ]; then
    # What its daemon needs of this machine.
    need containerd iptables libdevmapper1.02.1 runc
    scratch
    step "fetching Docker 20.10 of Debian 12" fetch
    keep "$work/root" "$dir"
fi
echo "$dir"
