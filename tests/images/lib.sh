# What the scripts of the root file systems share. Sourced, with `here` set.
. "$here/../../kernel-config/lib.sh"

# packed NAME TEXT [SOURCE]: what `assemble` leaves in $work/root, as a tar in the cache; says TEXT of it and prints its
# path.
packed() {
    local tar=$cache/images/$1-$(hash_of "$here/$1.sh" ${3:+"$here/$3"}).tar
    lock "$1"
    if [ ! -f "$tar" ]; then
        scratch
        step "assembling the $1 root" assemble
        step "packing it" pack_root "$work/root" "$work/tar"
        keep "$work/tar" "$tar"
    fi
    say "root: $2, $(stat -c %s "$tar" | numfmt --to=iec)"
    echo "$tar"
}

# program FILE [OPTION...]: compiles libc.rs, with further options of rustc.
program() {
    need gcc libc6-dev
    rustc --edition 2024 -C opt-level=1 -C strip=symbols "${@:2}" -o "$1" "$here/libc.rs"
}
