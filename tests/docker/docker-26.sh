#!/bin/bash
# The daemon of Docker 26 of Debian 13, unpacked: its containerd is that of ../containerd/containerd-1.7.sh.
# usage: docker-26.sh     prints the folder of its programs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

beside_ours trixie docker.io 26 dockerd usr/sbin
