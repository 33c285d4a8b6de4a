# Functions shared by the scripts that make kernels, images and the bed. Source it: . kernel-config/lib.sh
# Progress goes to stderr; stdout is kept for the one line a script answers with.

cache=${AMPOULE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ampoule}

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }

# step TEXT COMMAND...: run a command and say how long it took; on failure show the end of what it printed.
# The command runs with errexit in force.
step() {
    local text=$1 log began=$EPOCHREALTIME status=0
    shift
    log=$(mktemp)
    printf '%-58s ' "$text" >&2
    set +e
    (set -e; "$@") >"$log" 2>&1 </dev/null
    status=$?
    set -e
    if [ $status -ne 0 ]; then
        say "failed"
        tail -n 30 "$log" >&2
        rm -f "$log"
        die "$text: failed (status $status)"
    fi
    rm -f "$log"
    printf '%6.1f s\n' "$(seconds_since "$began")" >&2
}

# seconds_since EPOCHREALTIME
seconds_since() {
    local now=$EPOCHREALTIME
    printf '%d.%03d' $(((${now/[.,]/} - ${1/[.,]/}) / 1000000)) $(((${now/[.,]/} - ${1/[.,]/}) / 1000 % 1000))
}

# need PACKAGE...: install the Debian packages that are missing.
need() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] || step "installing ${missing[*]}" install_packages "${missing[@]}"
}

install_packages() {
    local release fd
    # apt-get waits for another one's installation, but not for its update.
    mkdir -p "$cache/locks"
    exec {fd}>"$cache/locks/packages"
    flock "$fd"
    apt_get update
    apt_get install "$@" && return
    # A package from backports can stand in the way of its siblings in the release; bring them to one version.
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    apt_get install --allow-downgrades "$@" $(backported_siblings "$@" | sed "s|\$|/$release|")
}

# backported_siblings PACKAGE...: installed packages from backports that are built from the same sources.
backported_siblings() {
    local sources
    sources=$(apt-cache show --no-all-versions "$@" | awk '$1 == "Source:" { printf " %s ", $2 }')
    dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version} ${source:Package}\n' |
        awk -v sources="$sources" '$1 == "ii" && $3 ~ /~bpo/ && index(sources, " " $4 " ") { print $2 }'
}

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"; }

# unpack_package PACKAGE DIR: fetch a Debian package and unpack it, without installing it.
unpack_package() {
    mkdir -p "$2/deb"
    (cd "$2/deb" && apt_get download "$1" || { apt_get update; apt_get download "$1"; })
    dpkg-deb -x "$2"/deb/*.deb "$2"
    rm -r "$2/deb"
}

# unpack_from RELEASE DIR PACKAGE...: the same from another release of the mirror that this machine's own comes from,
# without a change to its sources. Needs `scratch`.
unpack_from() {
    local release=$1 dir=$2 own mirror apt=$work/apt-$1 package
    shift 2
    own=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk -v release="$own" '$2 == release { print $1; exit }')
    mkdir -p "$apt/lists/partial"
    echo "deb $mirror $release main" >"$apt/sources.list"
    private_apt() {
        apt_get -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
            -o Dir::State::lists="$apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
    }
    private_apt update
    for package in "$@"; do
        mkdir -p "$apt/$package"
        (cd "$apt/$package" && private_apt download "$package/$release")
        dpkg-deb -x "$apt/$package"/*.deb "$dir"
    done
}

# beside_ours RELEASE PACKAGE VERSION PROGRAM FOLDER: a package of another release of Debian, unpacked once in the cache
# beside what this machine has. Prints where its FOLDER (all of it if empty) is kept, in which PROGRAM has this VERSION.
beside_ours() {
    local dir=$cache/${2%.io}/$3
    lock "${2%.io}-$3"
    if [ ! -d "$dir" ]; then
        scratch
        step "fetching ${2%.io} $3 of Debian $1" unpack_version "$@"
        keep "$work/root/$5" "$dir"
    fi
    echo "$dir"
}

unpack_version() {
    unpack_from "$1" "$work/root" "$2"
    "$work/root/$5/$4" --version | grep -F " $3."
}

# hash_of FILE-OR-WORD...: a short hash of the contents of files and of plain words.
hash_of() {
    local input
    for input in "$@"; do
        if [ -f "$input" ]; then sha256sum <"$input"; else printf '%s\n' "$input"; fi
    done | sha256sum | cut -c 1-16
}

# lock NAME: one run at a time makes a thing; later ones wait and then find it made.
# Held until `unlock` or the script's end.
lock() {
    mkdir -p "$cache/locks"
    exec {lock_fd}>"$cache/locks/$1"
    flock -n "$lock_fd" || { say "waiting for another run that makes $1"; flock "$lock_fd"; }
}

unlock() { exec {lock_fd}>&-; }

# at_exit COMMAND: run when the script ends, however it ends. Later ones run first.
at_exit() {
    at_exit_commands="$1; ${at_exit_commands:-}"
    trap "$at_exit_commands" EXIT
}

# scratch: a work folder in the cache, removed when the script ends. Sets $work.
scratch() {
    [ -z "${work:-}" ] || return 0
    mkdir -p "$cache/work"
    work=$(mktemp -d "$cache/work/XXXXXXXX")
    at_exit 'rm -rf "$work"'
}

# keep FILE-OR-DIR TARGET: move a finished thing into its place, at once or not at all.
keep() {
    mkdir -p "${2%/*}"
    mv -T "$1" "$2"
}

# pack_root DIR TAR: a root file system as a tar: sorted, numeric owners, no times.
pack_root() { tar -cf "$2" -C "$1" --sort=name --mtime=@0 --numeric-owner --format=gnu .; }
