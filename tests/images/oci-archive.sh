#!/bin/bash
# An image of the tests as an OCI archive, as `ctr image import` takes it; its one tag is `latest`.
# usage: oci-archive.sh NAME     NAME: alpine, debian, mini, pause, or layers (mini under 29 layers more);
#                                prints the path of the archive
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

[ $# -eq 1 ] || die "usage: oci-archive.sh NAME"
name=$1 base=$1
[ "$name" != layers ] || base=mini

# Each layer has a file of its own, writes one that the layer below wrote too, and removes what the one below added.
add_layers() {
    local image=$work/oci:latest layer
    for layer in $(seq 2 2 28); do
        mkdir "$work/$layer"
        echo "$layer" | tee "$work/$layer/top" >"$work/$layer/only-$layer"
        umoci insert --image "$image" "$work/$layer" /layers
        umoci insert --image "$image" --whiteout "/layers/only-$((layer - 2))"
    done
    echo 30 >"$work/last"
    umoci insert --image "$image" "$work/last" /layers/last
    umoci gc --layout "$work/oci"
}

set_pause_command() {
    umoci config --image "$work/oci:latest" --clear=config.cmd --config.cmd /pause --config.cmd -P
    umoci gc --layout "$work/oci"
}

root=$("$here/$base.sh")
archive=$cache/images/$name-$(hash_of "$here/oci-archive.sh" "$here/oci-layout.sh" "${root##*/}").oci.tar
lock "archive-$name"
if [ ! -f "$archive" ]; then
    need umoci
    scratch
    "$here/oci-layout.sh" "$root" "$work/oci" >/dev/null
    [ "$name" != layers ] || step "adding 29 layers" add_layers
    [ "$name" != pause ] || step "setting its command" set_pause_command
    step "packing the OCI archive of $name" tar -cf "$work/archive" -C "$work/oci" .
    keep "$work/archive" "$archive"
fi
echo "$archive"
