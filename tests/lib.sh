# Steps that the Makefile and the test scripts share. Sourced from the top of the tree, by bash.
. kernel-config/lib.sh

stage_kernel() {
    local vmlinux
    vmlinux=$(kernel-config/build-kernel.sh)
    place "$vmlinux" "$1/share/ampoule/vmlinux"
}

stage_guest() {
    local agent image
    agent=$(agent/build.sh)
    image=$(kernel-config/build-guest.sh --agent "$agent")
    place "$image" "$1/share/ampoule/guest.erofs"
}

stage_programs() {
    need gcc libc6-dev erofs-utils e2fsprogs
    local program
    step "building ampoule, ampoule-vmm and ampoule-fsd" cargo build --release --locked -p ampoule-shim -p ampoule-vmm -p ampoule-fsd
    for program in ampoule ampoule-vmm ampoule-fsd; do
        place "${CARGO_TARGET_DIR:-target}/release/$program" "$1/bin/$program"
    done
    # As containerd's runtime it is called by another name.
    ln -sfn ampoule "$1/bin/containerd-shim-ampoule-v2"
}

# place FILE TARGET: copy unless it is there already, replacing at once.
place() {
    cmp -s "$1" "$2" && return
    mkdir -p "${2%/*}"
    cp "$1" "$2.new"
    mv "$2.new" "$2"
}

# import_alpine AMPOULE: Alpine in the image store of whoever runs this.
import_alpine() {
    local tar
    tar=$(kernel-config/alpine-root.sh)
    step "importing Alpine into the image store" "$1" image import "$tar" alpine:3.23 alpine:latest
}

# images AMPOULE ROOT [NAME...]: the images of the tests in a store of their own.
images() {
    local ampoule=$1 root=$2 name tar
    shift 2
    [ $# -gt 0 ] || set -- alpine compat debian distroless mini static
    for name in "$@"; do
        tar=$(tests/images/"$name".sh)
        AMPOULE_ROOT=$root step "importing $name" "$ampoule" image import "$tar" "$name"
    done
}

# on_kvm AMPOULE COMMAND...: run it here where /dev/kvm is good enough, else in the bed; said in one line.
on_kvm() {
    local ampoule=$1 why
    shift
    if [ -z "${AMPOULE_BED:-}" ] && ! why=$("$ampoule" check --kvm 2>&1); then
        say "running in the bed, a host booted in software: $(head -n 1 <<<"$why")"
        set -- tests/bed/bed -- "$@"
    fi
    "$@"
}

demo() {
    local ampoule=$PWD/$1/bin/ampoule status=0
    import_alpine "$ampoule"
    say "--- ampoule run alpine"
    on_kvm "$ampoule" "$ampoule" run --timings alpine -- sh -c '
        echo "guest kernel:   $(uname -r)"
        echo "Alpine release: $(cat /etc/alpine-release)"
        ps -o pid,user,args' || status=$?
    say "--- exit code $status; the kernel of this host is $(uname -r)"
    return $status
}

install_to() {
    install -d "$2/bin" "$2/share/ampoule"
    install -m 755 "$1"/bin/{ampoule,ampoule-vmm,ampoule-fsd} "$2/bin/"
    ln -sfn ampoule "$2/bin/containerd-shim-ampoule-v2"
    install -m 644 "$1"/share/ampoule/* "$2/share/ampoule/"
    import_alpine "$2/bin/ampoule"
    say "installed to $2; try: $2/bin/ampoule run alpine -- uname -a"
}

# linted COMMAND...: cargo that compiles with clippy, which is rustc with further lints: what it makes can be run, and
# dependencies are compiled once for both.
linted() {
    RUSTC_WORKSPACE_WRAPPER=clippy-driver CLIPPY_ARGS=-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__ "$@"
}
