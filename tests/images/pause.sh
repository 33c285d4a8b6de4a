#!/bin/bash
# A root file system of one static program and nothing else: catatonit, which Debian offers as a pod's pause.
# usage: pause.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    unpack_package catatonit "$work/catatonit"
    mkdir "$work/root"
    cp "$work/catatonit/usr/bin/catatonit" "$work/root/pause"
}

packed pause "catatonit of Debian"
