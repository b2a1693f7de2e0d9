#!/usr/bin/env bash
# Installs the Debian packages that the tests need. Does nothing, quickly, when all are there.
#
# redis-server, nginx, prometheus, chromium, systemd's tools and shellcheck always; Node, npm, a C
# compiler and Python's venv only where they are missing.
set -euo pipefail

packages=()
command -v redis-server >/dev/null || packages+=(redis-server)
[ -x /usr/bin/chromium ] || packages+=(chromium)
[ -x /usr/sbin/nginx ] || packages+=(nginx-light)
[ -x /usr/bin/prometheus ] || packages+=(prometheus)
command -v systemd-analyze >/dev/null || packages+=(systemd)
command -v shellcheck >/dev/null || packages+=(shellcheck)
command -v node >/dev/null || packages+=(nodejs)
command -v npm >/dev/null || packages+=(npm)
command -v cc >/dev/null || packages+=(gcc libc6-dev)  # bench/c
# venv needs ensurepip, which Debian ships in a package of its own.
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)

if [ ${#packages[@]} -eq 0 ]; then
    exit 0
fi

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
echo "installing ${packages[*]}"
# The tests run Prometheus by themselves: its package must not start a service. Masked it starts neither
# now nor with the machine; systemctl unmask prometheus undoes that.
unit=/etc/systemd/system/prometheus.service
if [[ " ${packages[*]} " == *" prometheus "* && ! -e $unit && ! -L $unit ]]; then
    "${as_root[@]}" mkdir -p "${unit%/*}"
    "${as_root[@]}" ln -s /dev/null "$unit"
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${packages[@]}"
