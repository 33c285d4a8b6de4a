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

# backported_qemu DIR: from the mirror that this machine's release comes from, without a change to its sources.
backported_qemu() {
    local release mirror apt=$work/backports package
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk -v release="$release" '$2 == release { print $1; exit }')
    mkdir -p "$apt/lists/partial"
    echo "deb $mirror $release-backports main" >"$apt/sources.list"
    private_apt() {
        apt_get -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
            -o Dir::State::lists="$apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
    }
    private_apt update
    for package in qemu-system-x86 qemu-system-common qemu-system-data seabios; do
        mkdir -p "$apt/$package"
        (cd "$apt/$package" && private_apt download "$package/$release-backports")
        dpkg-deb -x "$apt/$package"/*.deb "$1"
    done
    "$1/usr/bin/qemu-system-x86_64" --version
}
