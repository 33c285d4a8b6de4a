#!/bin/bash
# A root file system of Alpine whose PID 1 is BusyBox's init, which starts services by OpenRC.
# usage: openrc.sh     prints the path of the tar
exec "$(dirname "$0")/../../kernel-config/alpine-root.sh" openrc busybox-openrc
