# The emulator of the bed. Sourced by `bed`.

# Sets qemu=(PROGRAM OPTION...): QEMU 10 or later, from the release's backports where the release has an older one, in
# the cache; the release's own stays as it is. On QEMU 7.2 a VM of several vCPUs corrupts the kernel of the bed's host:
# 2 of 2 runs of 30 VMs with 4 vCPUs ended in its panic; on 10.0 none of 3 did.
find_qemu() {
    need qemu-system-x86
    qemu=(qemu-system-x86_64)
    local version newer=$cache/bed/qemu-10
    version=$(dpkg-query -W -f '${source:Upstream-Version}' qemu-system-x86)
    dpkg --compare-versions "$version" lt 10 || return 0
    if [ ! -d "$newer" ]; then
        lock bed-qemu
        scratch
        set +e # errexit would not hold inside a condition
        (
            set -e
            [ ! -d "$newer" ] || exit 0
            step "fetching QEMU 10 for the bed" backported_qemu "$work/qemu"
            keep "$work/qemu" "$newer"
        )
        set -e
        unlock
        [ -d "$newer" ] || { say "the bed runs on QEMU $version, where VMs of several vCPUs are unsteady"; return 0; }
    fi
    qemu=("$newer/usr/bin/qemu-system-x86_64" -L "$newer/usr/share/seabios" -L "$newer/usr/share/qemu")
}

backported_qemu() {
    unpack_from "$(. /etc/os-release && echo "$VERSION_CODENAME")-backports" "$1" \
        qemu-system-x86 qemu-system-common qemu-system-data seabios
    "$1/usr/bin/qemu-system-x86_64" --version
}
