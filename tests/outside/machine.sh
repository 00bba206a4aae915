#!/bin/bash
# The first process of a machine of world.py: mounts what is its own, and then is its sshd.
#   machine.sh NAME FOLDER SHARED HOSTS PROJECT
set -euo pipefail
name=$1 folder=$2 shared=$3 hosts=$4 project=$5
mount --make-rprivate /
hostname "$name"
mkdir -p "$folder"/{root/.ssh,tmp}
chmod 1777 "$folder/tmp"
chmod 700 "$folder/root" "$folder/root/.ssh"
# What lies below /tmp or /root of the test's own machine is kept aside, and laid back where it was.
mount -t tmpfs tmpfs /srv
mkdir /srv/project /srv/shared /srv/own /srv/python
mount --rbind "$project" /srv/project
mount --bind "$shared" /srv/shared
mount --bind "$folder" /srv/own
python=$(dirname "$(dirname "$(readlink -f "$project/.venv/bin/python")")")
mount --bind "$python" /srv/python
mount --bind "$hosts" /etc/hosts
mount --bind /srv/own/tmp /tmp
mount --bind /srv/own/root /root
mkdir -p "$project" "$python"
mount --rbind /srv/project "$project"
mount --bind /srv/python "$python"
mount --bind /srv/shared /mnt
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
export HOME=/root
exec /usr/sbin/sshd -D -e -o PermitRootLogin=prohibit-password -o StrictModes=no -o UsePAM=no -o MaxStartups=100
