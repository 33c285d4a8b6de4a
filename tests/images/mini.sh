#!/bin/bash
# A root file system of BusyBox (static) and the musl loader: the smallest that runs a shell and a musl program.
# usage: mini.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    unpack_package busybox-static "$work/busybox"
    unpack_package musl "$work/musl"
    mkdir -p "$work"/root/{bin,dev,etc,lib,proc,root,sys,tmp,usr/bin}
    chmod 1777 "$work/root/tmp"
    chmod 700 "$work/root/root"
    cp "$work/busybox/bin/busybox" "$work/root/bin/"
    for applet in $("$work/root/bin/busybox" --list); do
        [ "$applet" = busybox ] || ln -s busybox "$work/root/bin/$applet"
    done
    cp "$work"/musl/lib/*/libc.so "$work/root/lib/ld-musl-x86_64.so.1"
    echo root:x:0:0:root:/root:/bin/sh >"$work/root/etc/passwd"
    echo root:x:0: >"$work/root/etc/group"
}

packed mini "BusyBox and musl of Debian"
