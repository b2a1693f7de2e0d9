#!/usr/bin/env bash
# Installs the broker of this checkout for systemd: user, folders, a venv in /opt/broker, units.
# Installing again brings it up to date and keeps the configuration; what runs goes on running.
#
#   deploy/install.sh [--start]      --start also starts and enables broker.service
#
# PYTHON is the Python to use (3.11 or newer). With DESTDIR everything goes below that folder, and
# neither users nor systemd are touched; the venv then works in that place only.
set -euo pipefail
umask 022 # the user broker reads what root installs

source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${DESTDIR:-}
python=${PYTHON:-python3}
start=no
for argument in "$@"; do
    case $argument in
        --start) start=yes ;;
        *) echo "usage: [DESTDIR=DIR] [PYTHON=FILE] $0 [--start]" >&2; exit 2 ;;
    esac
done

if [ -z "$root" ] && [ "$(id -u)" -ne 0 ]; then
    echo "install.sh: run it as root, or set DESTDIR" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "install.sh: $python is no Python of 3.11 or newer with venv; set PYTHON" >&2
    exit 1
fi

owner=() shared=()
if [ -z "$root" ]; then
    if ! getent passwd broker >/dev/null; then
        useradd --system --user-group --home-dir /var/lib/broker --no-create-home \
            --shell /usr/sbin/nologin broker
    fi
    owner=(-o broker -g broker) shared=(-o root -g broker)
fi
install -d -m 0755 "$root/opt" "$root/etc" "$root/var/lib" "$root/etc/systemd/system"
install -d -m 0750 "${owner[@]}" "$root/var/lib/broker"
install -d -m 0750 "${shared[@]}" "$root/etc/broker"
if [ ! -e "$root/etc/broker/broker.yaml" ]; then
    install -m 0640 "${shared[@]}" "$source_dir/deploy/broker.yaml" "$root/etc/broker/broker.yaml"
fi

venv=$root/opt/broker
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install)
"${pip[@]}" --require-hashes -r "$source_dir/requirements.lock"
build=$(mktemp -d) # so that building leaves nothing in the checkout
trap 'rm -rf "$build"' EXIT
cp -R "$source_dir"/{pyproject.toml,README.md,broker,gateway,shards} "$build"
"${pip[@]}" --no-deps --force-reinstall "$build"
"$venv/bin/python" -m compileall -q "$venv/lib" # nobody who runs it may write there

# From 253 on systemd knows by itself when a reload is done.
reload=()
version=$(systemctl --version 2>/dev/null | awk 'NR == 1 { print int($2) }') || version=0
if [ "${version:-0}" -ge 253 ]; then
    reload=(-e 's/^Type=notify$/Type=notify-reload/' -e '/^ExecReload=/d')
fi
for unit in "$source_dir"/deploy/systemd/broker*; do
    sed -e '' "${reload[@]}" "$unit" >"$build/unit"
    install -m 0644 "$build/unit" "$root/etc/systemd/system/${unit##*/}"
done

if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    if [ $start = yes ]; then
        systemctl enable --now broker.service
    fi
elif [ $start = yes ]; then
    echo "install.sh: systemd does not run here, nothing is started" >&2
fi
echo "installed; configuration: $root/etc/broker/broker.yaml"
