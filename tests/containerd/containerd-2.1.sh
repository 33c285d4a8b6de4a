#!/bin/bash
# containerd 2.1 of Debian 14, unpacked beside this machine's own containerd.
# usage: containerd-2.1.sh     prints the folder of its programs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

beside_ours forky containerd 2.1 containerd usr/bin
