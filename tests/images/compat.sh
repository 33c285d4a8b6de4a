#!/bin/bash
# A root file system of Alpine with a program that was linked with glibc: its loader is musl's, under glibc's name, as of
# Alpine's libc6-compat. gcompat, its successor, is no package of this machine's mirrors.
# usage: compat.sh     prints the path of the tar
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

assemble() {
    mkdir "$work/root"
    tar -xf "$("$here/alpine.sh")" -C "$work/root" --numeric-owner
    mkdir -p "$work/root/lib64"
    ln -s /lib/ld-musl-x86_64.so.1 "$work/root/lib64/ld-linux-x86-64.so.2"
    need gcc libc6-dev
    gcc -O2 -o "$work/root/libc" -x c - <<'END'
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Says which C library it runs with, as libc.rs does. */
int main(void) {
    char line[4096];
    const char *libc = "static";
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps)
        return 1;
    while (fgets(line, sizeof line, maps))
        if (strstr(line, "ld-musl"))
            libc = "ld-musl";
    printf("%s %s\n", libc, getenv("PATH") ? "true" : "false");
    return 0;
}
END
}

packed compat "Alpine and a program of glibc's"
