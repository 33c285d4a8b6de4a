#!/bin/bash
# Docker 20.10 of Debian 12, unpacked: installed, its daemon would be started on this machine.
# usage: docker-20.10.sh     prints the folder it is unpacked in
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

# What its daemon needs of this machine.
need containerd iptables libdevmapper1.02.1 runc
beside_ours bookworm docker.io 20.10 usr/sbin/dockerd ''
