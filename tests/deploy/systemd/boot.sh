#!/bin/sh
# Becomes systemd, as PID 1, in namespaces of its own: an overlay over / whose changes are forgotten,
# with this checkout installed in /opt/broker. Runs `inside.sh` there and powers off.
#   unshare --pid --fork --mount --net --cgroup --ipc --uts --kill-child boot.sh CHECKOUT SHARE
# CHECKOUT/.venv has the packages; SHARE is a folder for what comes of it.
set -e
checkout=$1 share=$2
mount --make-rprivate /
base=$share/root
mkdir -p "$base"
mount -t tmpfs -o size=1g tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
root=$base/root
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
mkdir "$root/sys/fs/cgroup/systemd"
mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir "$root/tmp/share"
mount --bind "$share" "$root/tmp/share"
ip link set lo up
hostname broker-test

# Python, out of whoever's home it is in: the units can't see those.
python=$("$checkout/.venv/bin/python" -c 'import sys; print(sys.base_prefix)')
rm -rf "$root/opt/broker" "$root/opt/python"
mkdir -p "$root/opt/python"
mount --bind "$python" "$root/opt/python"
chroot "$root" /opt/python/bin/python3 -m venv --without-pip /opt/broker
packages=$(echo "$root"/opt/broker/lib/python3*/site-packages)
cp -r "$checkout"/.venv/lib/python3*/site-packages/. "$packages"
rm -f "$packages"/__editable__*
cp -r "$checkout/broker" "$checkout/gateway" "$checkout/shards" "$packages"
cat > "$root/opt/broker/bin/broker" <<'PROGRAM'
#!/opt/broker/bin/python3
import sys
from broker.cli import main
sys.exit(main())
PROGRAM
chmod 755 "$root/opt/broker/bin/broker"

chroot "$root" useradd --system --user-group --home-dir /var/lib/broker broker
mkdir -p "$root/etc/broker"
cp "$checkout/deploy/broker.yaml" "$root/etc/broker/"
echo "LD_LIBRARY_PATH=/opt/python/lib" > "$root/etc/broker/environment" # it may have a libpython
chroot "$root" chown -R root:broker /etc/broker
units=$root/etc/systemd/system
cp "$checkout"/deploy/systemd/* "$units"
cat > "$units/broker-test.target" <<'UNIT'
[Unit]
Requires=broker-test.service
UNIT
cat > "$units/broker-test.service" <<'UNIT'
[Unit]
DefaultDependencies=no
Wants=basic.target
After=basic.target
[Service]
Type=oneshot
ExecStart=/bin/sh /tmp/share/inside.sh
StandardOutput=file:/tmp/share/output
StandardError=file:/tmp/share/errors
TimeoutStartSec=100
ExecStopPost=/bin/kill -RTMIN+14 1
UNIT
for unit in systemd-udevd systemd-udev-trigger systemd-logind dbus systemd-timesyncd ssh cron; do
    ln -sf /dev/null "$units/$unit.service"
done

# Not chroot: in one the kernel makes no user namespaces, which PrivateUsers= is.
cd "$root"
mkdir old
pivot_root . old
umount -l /old
exec env -i container=broker-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd \
    --system --unit=broker-test.target --log-target=journal --show-status=no </dev/null >/dev/null 2>&1
