#!/bin/bash
# containerd 1.7 of Debian 13, unpacked beside this machine's own containerd.
# usage: containerd-1.7.sh     prints the folder of its programs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

beside_ours trixie containerd 1.7 containerd usr/bin
