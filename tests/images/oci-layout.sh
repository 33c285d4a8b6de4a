#!/bin/bash
# Make an OCI layout of one image from the tar of a root file system.
# usage: oci-layout.sh TAR DIR [TAG]     DIR must not exist; the image is DIR:TAG (latest), its command /bin/sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

[ $# -ge 2 ] || die "usage: oci-layout.sh TAR DIR [TAG]"
tar=$(realpath "$1") dir=$2 tag=${3:-latest}
[ ! -e "$dir" ] || die "$dir exists"

make_layout() {
    local image=$dir:$tag
    mkdir "$work/root"
    tar -xf "$tar" -C "$work/root" --numeric-owner --same-permissions
    umoci init --layout "$dir"
    umoci new --image "$image"
    umoci insert --image "$image" "$work/root" /
    umoci config --image "$image" --config.cmd /bin/sh \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    umoci gc --layout "$dir"
}

need umoci
scratch
step "making the OCI layout ${dir##*/}:$tag" make_layout
echo "$dir"
