#!/bin/bash
# The root folder of a containerd that has the images of the tests unpacked: unpacking them in the bed takes minutes.
# A containerd of the tests copies its two databases and mounts the rest.
# usage: root.sh     prints the folder
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

# import_into NAMESPACE NAME...
import_into() {
    local namespace=$1 name image
    shift
    for name in "$@"; do
        image=docker.io/local/$name
        ctr -n "$namespace" image import --base-name "$image" "$(grep "/$name-" <<<"$archives")"
        ctr -n "$namespace" image check -q "name==$image:latest" | grep -F "$image"
    done
}

# Runs in namespaces of its own, which end everything it started.
import() {
    mount -t tmpfs run /run
    cat >"$work/config.toml" <<TOML
version = 2
root = "$work/root"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[plugins."io.containerd.internal.v1.opt"]
path = "/run/opt"
TOML
    containerd --config "$work/config.toml" 2>"$work/log" &
    timeout 60 sh -c 'until ctr version >/dev/null 2>&1; do sleep 0.1; done' || { cat "$work/log" >&2; exit 1; }
    import_into default alpine debian mini pause layers
    import_into k8s.io alpine pause # that of CRI
    kill $!
    wait $! || true
}

archives=$(for name in alpine debian mini pause layers; do "$here/../images/oci-archive.sh" "$name"; done)
dir=$cache/containerd/root-$(hash_of "$here/root.sh" "$archives")
lock containerd-root
if [ ! -d "$dir" ]; then
    need containerd
    scratch
    export -f import import_into
    export work archives
    step "unpacking the images in a containerd" unshare --mount --pid --fork --kill-child --mount-proc \
        bash -euo pipefail -c import
    keep "$work/root" "$dir"
fi
echo "$dir"
