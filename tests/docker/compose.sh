#!/bin/bash
# Docker Compose 2 of Debian 13, unpacked.
# usage: compose.sh     prints the folder of its program, which can be called as docker-compose
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../kernel-config/lib.sh"

beside_ours trixie docker-compose 2.26 docker-compose usr/libexec/docker/cli-plugins
