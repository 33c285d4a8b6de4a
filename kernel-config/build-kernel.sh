#!/bin/bash
# Build the guest kernel: an uncompressed vmlinux of Linux 6.12 from the option fragments and patches in this folder.
# usage: build-kernel.sh [--tarball PATH]     prints the path of vmlinux; `config` and `System.map` lie beside it
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
. "$here/pins"

fragments=("$here"/{base,virtio,container,net}.config)
patches=("$here"/patches/*.patch)
tarball=''
case ${1:-} in
--tarball) tarball=$(realpath "$2") ;;
'') ;;
*) die "usage: build-kernel.sh [--tarball PATH]" ;;
esac

# Sets $source_sha256 and, if the kernel has yet to be built, makes sure that $tarball is there.
find_source() {
    if [ -n "$tarball" ]; then
        source_sha256=$(sha256sum <"$tarball" | cut -d ' ' -f 1)
        return
    fi
    source_sha256=$linux_sha256
    tarball=$cache/source/$linux_package-$linux_version.tar.xz
    [ ! -f "$(target)" ] && [ ! -f "$tarball" ] || return 0
    if ! available "$linux_version"; then
        step "reading the package lists" apt_get update
    fi
    if ! available "$linux_version"; then
        linux_version=$(apt-cache policy "$linux_package" | awk '$1 == "Candidate:" { print $2 }')
        [ -n "$linux_version" ] && [ "$linux_version" != "(none)" ] || die "no package $linux_package; give a source with --tarball"
        say "the archive no longer has the pinned version of $linux_package: taking $linux_version, unpinned"
        tarball=$cache/source/$linux_package-$linux_version.tar.xz
        linux_sha256=''
    fi
    [ -f "$tarball" ] || step "fetching $linux_package $linux_version" fetch_source
    [ -n "$linux_sha256" ] || source_sha256=$(sha256sum <"$tarball" | cut -d ' ' -f 1)
}

available() { apt-cache madison "$linux_package" | awk '{ print $3 }' | grep -qxF "$1"; }

fetch_source() {
    unpack_package "$linux_package=$linux_version" "$work/source"
    set -- "$work"/source/usr/src/*.tar.xz
    [ -z "$linux_sha256" ] || echo "$linux_sha256  $1" | sha256sum --check --quiet
    keep "$1" "$tarball"
}

# The kernel's place in the cache is a hash of everything that shapes it.
target() {
    local recipe compiler
    recipe=$(declare -f apply_patches configure compile collect)
    compiler=$(cc --version | head -n 1)
    echo "$cache/kernel/$(hash_of "${fragments[@]}" "${patches[@]}" "$recipe" "$source_sha256" "$compiler")/vmlinux"
}

# On every processor, and without the largest parts that are never compiled; Kconfig needs its files of all parts.
unpack_source() {
    mkdir "$work/linux"
    XZ_DEFAULTS=--threads=0 tar -xf "$tarball" -C "$work/linux" --strip-components 1 \
        --exclude='*/Documentation/*/*' --exclude='*/arch/*.dts*' --exclude='*/drivers/gpu/*.[ch]' \
        --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/drivers/net/wireless/*.[ch]'
}

# The patches shorten boot and the build, but for two, without which shares have no access control lists, and locks hold in
# the guest only: another source than the pinned one does without those that no longer fit.
apply_patches() {
    local patch
    for patch in "${patches[@]}"; do
        if patch --dry-run --batch -p1 -d "$work/linux" <"$patch" >/dev/null; then
            patch --batch --silent -p1 -d "$work/linux" <"$patch"
        else
            say "does not fit this source, left out: ${patch##*/}"
        fi
    done
}

# Everything off, then the fragments; then see that Kconfig left every option as it was asked for.
configure() {
    local requested=$work/requested config=$work/build/.config
    cat "${fragments[@]}" >"$requested"
    make -C "$work/linux" O="$work/build" KCONFIG_ALLCONFIG="$requested" allnoconfig
    grep '^CONFIG_' "$requested" | grep -vxFf "$config" >"$work/wrong" || true
    sed -n 's/^\(CONFIG_[^=]*\)=.*/# \1 is not set/p' "$config" | grep -xFf "$requested" >>"$work/wrong" || true
    [ ! -s "$work/wrong" ] || { echo "not as requested:"; cat "$work/wrong"; return 1; }
}

# The same inputs give the same bytes: no date, user or machine name inside.
compile() {
    make -C "$work/linux" O="$work/build" -j"$(nproc)" \
        KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=ampoule KBUILD_BUILD_HOST=ampoule KBUILD_BUILD_VERSION=1 vmlinux
}

# Symbols go: the kernel's own table names functions in a panic.
collect() {
    mkdir "$work/out"
    strip --strip-all -o "$work/out/vmlinux" "$work/build/vmlinux"
    cp "$work/build/.config" "$work/out/config"
    cp "$work/build/System.map" "$work/out/"
}

need build-essential bc bison flex libelf-dev patch xz-utils
lock kernel
scratch
find_source
vmlinux=$(target)
if [ ! -f "$vmlinux" ]; then
    step "unpacking the kernel source" unpack_source
    apply_patches
    step "configuring" configure
    step "compiling the kernel (minutes)" compile
    step "collecting" collect
    keep "$work/out" "${vmlinux%/*}"
fi
say "kernel: $(stat -c %s "$vmlinux" | numfmt --to=iec) $vmlinux"
echo "$vmlinux"
