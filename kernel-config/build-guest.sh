#!/bin/bash
# Build the guest image: an Alpine root with the agent as PID 1, as a read-only EROFS file.
# usage: build-guest.sh --agent PATH     prints the path of guest.erofs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

agent=''
case ${1:-} in
--agent) agent=$(realpath "$2") ;;
esac
[ -f "$agent" ] || die "usage: build-guest.sh --agent PATH"
need binutils erofs-utils
readelf -h "$agent" | grep -q X86-64 || die "$agent: not a program for x86-64"
! readelf -l "$agent" | grep -q INTERP || die "$agent: not statically linked; the guest has no library it could load"

assemble() {
    mkdir "$work/root"
    tar -xf "$alpine" -C "$work/root"
    # Where the agent mounts; the image itself is never written.
    for dir in proc sys dev run tmp mnt; do
        rm -rf "$work/root/$dir"
        mkdir "$work/root/$dir"
    done
    install -m 755 "$agent" "$work/root/sbin/ampoule-agent"
}

# Alpine is compressed, for size. The agent, read at every boot, is not: pages go straight from disk to memory.
# No times, owners or random identity: the same inputs give the same bytes.
make_image() {
    echo '0 ^sbin/ampoule-agent$' >"$work/hints"
    mkfs.erofs -zlz4hc,12 --compress-hints="$work/hints" -C 65536 -T 0 --all-root \
        -U 616d706f-756c-6520-6775-657374000000 "$work/guest.erofs" "$work/root"
}

alpine=$("$here/alpine-root.sh")
lock guest
guest=$cache/guest/$(hash_of "$here/build-guest.sh" "$alpine" "$agent")/guest.erofs
if [ ! -f "$guest" ]; then
    scratch
    step "assembling the guest root" assemble
    step "making the guest image" make_image
    keep "$work/guest.erofs" "$guest"
fi
say "guest image: $(stat -c %s "$guest" | numfmt --to=iec) $guest"
echo "$guest"
