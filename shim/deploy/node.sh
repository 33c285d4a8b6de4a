#!/bin/sh
# node.sh: what the DaemonSet does on a node, whose root is mounted at /node: install, wait, take out again.
# Running pods keep their VMs over both restarts of containerd.
set -eu
node=${NODE:-/node}
from=${FROM:-/deploy/ampoule}
prefix=/usr/local
config=${CONTAINERD_CONFIG:-/etc/containerd/config.toml}
service=${CONTAINERD_SERVICE:-containerd}
# There as long as it is installed, for the readiness probe.
ready=${READY:-/run/installed}

on_node() { chroot "$node" "$@"; }

install_files() {
    mkdir -p "$node$prefix/bin" "$node$prefix/share/ampoule"
    # Replaced by a rename: a program that runs cannot be written to.
    for file in bin/ampoule bin/ampoule-vmm bin/ampoule-fsd share/ampoule/vmlinux share/ampoule/guest.erofs; do
        cp "$from/$file" "$node$prefix/$file.new"
        mv "$node$prefix/$file.new" "$node$prefix/$file"
    done
    ln -sfn ampoule "$node$prefix/bin/containerd-shim-ampoule-v2"
}

# edit [--undo]: edits containerd's configuration; its status says whether that changed anything.
edit() {
    before=$(cat "$node$config" 2>/dev/null || true)
    on_node "$prefix/bin/ampoule" install --containerd --config "$config" "$@" >/dev/null || exit 1
    [ "$before" != "$(cat "$node$config" 2>/dev/null || true)" ]
}

restart() { nsenter --target 1 --mount -- systemctl restart "$service"; }

add() {
    if edit && ! restart; then
        # Else the next try would find nothing to change, and would not restart it.
        edit --undo || true
        echo "$service was not restarted, so that it does not know of ampoule" >&2
        exit 1
    fi
}

remove() {
    trap - TERM INT
    kill $! 2>/dev/null || true
    rm -f "$ready"
    if edit --undo; then restart; fi
    # The files stay for the pods that still run.
    exit 0
}

install_files
on_node "$prefix/bin/ampoule" check >&2 || {
    echo "this node cannot run sandboxes; take the label ampoule/runtime off it" >&2
    exit 1
}
trap remove TERM INT
add
touch "$ready"
echo "installed; the RuntimeClass is in shim/deploy/runtimeclass.yaml"
while :; do sleep 3600 & wait $!; done
