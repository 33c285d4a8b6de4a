#!/bin/sh
# node.sh: what the DaemonSet does on a node, whose root is mounted at /node: install, wait, take out again.
# Running pods keep their VMs over both restarts of containerd.
set -eu
node=/node
prefix=/usr/local
config=/etc/containerd/config.toml

on_node() { chroot "$node" "$@"; }

# handler [--undo]: edits containerd's configuration, and restarts it if that changed anything.
handler() {
    before=$(cat "$node$config" 2>/dev/null || true)
    on_node "$prefix/bin/ampoule" install --containerd --config "$config" "$@" >/dev/null
    [ "$before" = "$(cat "$node$config" 2>/dev/null || true)" ] ||
        nsenter --target 1 --mount -- systemctl restart containerd
}

install_files() {
    mkdir -p "$node$prefix/bin" "$node$prefix/share/ampoule"
    # Replaced by a rename: a program that runs cannot be written to.
    for file in bin/ampoule bin/ampoule-vmm bin/ampoule-fsd share/ampoule/vmlinux share/ampoule/guest.erofs; do
        cp "/deploy/ampoule/$file" "$node$prefix/$file.new"
        mv "$node$prefix/$file.new" "$node$prefix/$file"
    done
    ln -sfn ampoule "$node$prefix/bin/containerd-shim-ampoule-v2"
}

remove() {
    trap - TERM INT
    handler --undo
    # The files stay for the pods that still run.
    exit
}

install_files
on_node "$prefix/bin/ampoule" check || echo "this node cannot run sandboxes; see above" >&2
handler
echo "installed; the RuntimeClass is in shim/deploy/runtimeclass.yaml"
trap remove TERM INT
while :; do sleep 3600 & wait $!; done
