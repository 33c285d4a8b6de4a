#!/bin/bash
# A root file system of Alpine (musl): the one the guest image is made of.
# usage: alpine.sh     prints the path of the tar
exec "$(dirname "$0")/../../kernel-config/alpine-root.sh"
