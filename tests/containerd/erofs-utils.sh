#!/bin/bash
# A mkfs.erofs that reads archives (`--tar`, erofs-utils 1.7), as containerd's EROFS differ has it do: this machine's own,
# or else that of Debian 13, with the C library it needs.
# usage: erofs-utils.sh     prints the folder of the program
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

unpack_newer() {
    unpack_from trixie "$1" erofs-utils libc6 libdeflate0 liblz4-1 liblzma5 libpcre2-8-0 libselinux1 libuuid1 libxxhash0 \
        libzstd1 zlib1g
    mv "$1/usr/bin/mkfs.erofs" "$1/usr/lib/mkfs.erofs"
    cat >"$1/usr/bin/mkfs.erofs" <<'SH'
#!/bin/sh
lib=${0%/bin/*}/lib
exec "$lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$lib/x86_64-linux-gnu" "$lib/mkfs.erofs" "$@"
SH
    chmod 755 "$1/usr/bin/mkfs.erofs"
    "$1/usr/bin/mkfs.erofs" --help | grep -F -e --tar
}

need erofs-utils
if mkfs.erofs --help 2>&1 | grep -qF -e --tar; then
    dirname "$(command -v mkfs.erofs)"
    exit
fi
dir=$cache/erofs-utils/1.8
lock erofs-utils-1.8
if [ ! -d "$dir" ]; then
    scratch
    step "fetching erofs-utils 1.8 of Debian 13" unpack_newer "$work/root"
    keep "$work/root" "$dir"
fi
echo "$dir/usr/bin"
