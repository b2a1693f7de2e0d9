#!/usr/bin/env bash
# Removes what install.sh installed. Configuration, data and the user stay, unless --purge is given.
#
#   deploy/uninstall.sh [--purge]
#
# DESTDIR as for install.sh.
set -euo pipefail

root=${DESTDIR:-}
purge=no
for argument in "$@"; do
    case $argument in
        --purge) purge=yes ;;
        *) echo "usage: [DESTDIR=DIR] $0 [--purge]" >&2; exit 2 ;;
    esac
done
if [ -z "$root" ] && [ "$(id -u)" -ne 0 ]; then
    echo "uninstall.sh: run it as root, or set DESTDIR" >&2
    exit 1
fi

units=(broker.service broker-gateway{,@}.service broker-shard@.service broker.target)
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    mapfile -t instances < <(systemctl list-units --all --plain --no-legend 'broker-shard@*' \
        'broker-gateway@*' | awk '{ print $1 }')
    for unit in broker.service broker.target broker-gateway.service "${instances[@]}"; do
        systemctl disable --now "$unit" 2>/dev/null || true # one that is not installed
    done
fi
for unit in "${units[@]}"; do
    rm -f "$root/etc/systemd/system/$unit"
done
rm -rf "$root/etc/systemd/system/broker.target.wants" "$root/opt/broker"
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi

if [ $purge = yes ]; then
    rm -rf "$root/etc/broker" "$root/var/lib/broker"
    if [ -z "$root" ] && getent passwd broker >/dev/null; then
        userdel broker
    fi
    echo "removed, with configuration and data"
else
    echo "removed; $root/etc/broker and $root/var/lib/broker are kept"
fi
