#!/bin/sh
# boot.sh STAGE VENV PYTHON: systemd as process 1 of namespaces of its own, over an overlay of this machine's files, with
# what lies in STAGE/root on top of them, and in /opt/spilld VENV with STAGE/venv on top. Nothing that it writes stays.
# PYTHON is where the venv's interpreter lies.
# To be run by `unshare --mount --pid --fork --cgroup --net --uts --ipc`, as root, in a cgroup of its own.
set -eu
stage=$1 venv=$2 python=$3 here=$1/machine
mount --make-rprivate /
mkdir "$here"
mount -t tmpfs tmpfs "$here"
cd "$here"
mkdir root root-work venv-work
cp -a "$stage/root" root-up
cp -a "$stage/venv" venv-up
mount -t overlay -o "lowerdir=/,upperdir=root-up,workdir=root-work" overlay root
mkdir -p root/opt/spilld
mount -t overlay -o "lowerdir=$venv,upperdir=venv-up,workdir=venv-work" overlay root/opt/spilld
rm -f root/opt/spilld/lib/python*/site-packages/__editable__*
while [ "$python" != / ]; do # it may lie in a home that is closed to others
    chmod a+rx "root$python"
    python=$(dirname "$python")
done
cd root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for folder in dev run tmp; do mount -t tmpfs tmpfs $folder; done
mkdir dev/shm dev/pts old
for node in null zero full random urandom tty; do
    touch dev/$node
    mount --bind /dev/$node dev/$node
done
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
pivot_root . old
cd /
umount -l old
systemd-sysusers
exec env -i container=spilld-boot PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=spilld.service --log-target=journal --show-status=no
