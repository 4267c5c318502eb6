# shellcheck shell=bash
# The private libvirtd of one environment. libvirtd knows its folders by fixed names (/etc/libvirt, /run/libvirt...),
# so it runs in a mount namespace of its own in which those names are the environment's folders.

# QEMU runs as this user and group: the host's libvirt-qemu, or where it has none, one that only the private
# libvirtd knows, with Debian's number for it.
DYAD_QEMU_USER=libvirt-qemu
DYAD_QEMU_ID=64055

DYAD_LIBVIRT_FOLDERS=(etc lib run cache log)

# host_folder NAME: where libvirtd looks for it.
host_folder() {
    case $1 in
    etc) printf '/etc/libvirt\n' ;;
    run) printf '/run/libvirt\n' ;;
    *) printf '/var/%s/libvirt\n' "$1" ;;
    esac
}

libvirt_uri() { printf 'qemu+unix:///system?socket=%s/libvirt/run/libvirt-sock\n' "$1"; }

write_libvirt_config() {
    local dir=$1 name
    for name in "${DYAD_LIBVIRT_FOLDERS[@]}"; do mkdir -p "$dir/libvirt/$name"; done
    cat >"$dir/libvirt/etc/libvirtd.conf" <<CONF
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
unix_sock_admin_perms = "0700"
host_uuid = "$(cat /proc/sys/kernel/random/uuid)"
log_outputs = "3:stderr"
CONF
    # Without virtlogd QEMU writes its log itself. Where the host confines nothing, say so: libvirt would only warn.
    cat >"$dir/libvirt/etc/qemu.conf" <<CONF
user = "$DYAD_QEMU_USER"
group = "$DYAD_QEMU_USER"
dynamic_ownership = 1
seccomp_sandbox = 1
stdio_handler = "file"
CONF
    write_accounts "$dir"
    if [ ! -d /sys/fs/selinux/booleans ] && [ ! -e /sys/kernel/security/apparmor/profiles ]; then
        printf 'security_driver = "none"\n' >>"$dir/libvirt/etc/qemu.conf"
    fi
}

# write_accounts DIR: libvirtd does not start where its compiled-in user has no name, and we add none to the host:
# it sees copies of passwd and group with these names in them.
write_accounts() {
    local dir=$1 name
    cp /etc/passwd /etc/group "$dir/libvirt/"
    getent passwd "$DYAD_QEMU_USER" >/dev/null ||
        printf '%s:x:%s:%s:Dyad QEMU:/nonexistent:/usr/sbin/nologin\n' "$DYAD_QEMU_USER" "$DYAD_QEMU_ID" "$DYAD_QEMU_ID" >>"$dir/libvirt/passwd"
    for name in "$DYAD_QEMU_USER" kvm; do
        getent group "$name" >/dev/null || printf '%s:x:%s:\n' "$name" "$DYAD_QEMU_ID" >>"$dir/libvirt/group"
    done
}

# start_libvirtd DIR: starts it unless it runs, and waits for its socket. The lock is that of remove_made_folders.
start_libvirtd() {
    locked made-folders start_libvirtd_here "$1"
}

start_libvirtd_here() {
    local dir=$1 name
    if ! daemon_pid "$dir" libvirtd >/dev/null; then
        # A bind mount needs something to be mounted on. `down` takes away what was made here.
        for name in "${DYAD_LIBVIRT_FOLDERS[@]}"; do make_mount_point "$(host_folder "$name")"; done
        start_daemon "$dir" libvirtd unshare --mount --propagation slave bash "$DYAD_REPO/hack/lib/libvirtd-in-namespace" "$dir"
    fi
    await libvirtd "$dir" libvirtd libvirt_ready "$dir"
}

# make_mount_point FOLDER: an empty folder on the host where it has none; remembered for `remove_made_folders`.
make_mount_point() {
    if [ ! -d "$1" ]; then
        mkdir "$1"
        printf '%s\n' "$1" >>"$DYAD_CACHE/made-folders"
    fi
}

libvirt_ready() {
    [ -S "$1/libvirt/run/libvirt-sock" ] && virsh -c "$(libvirt_uri "$1")" -q uri >/dev/null 2>&1
}

# remove_made_folders: the empty mount points, unless another environment still uses them (removing a folder that is
# a mount point in another namespace would take the mount away there).
remove_made_folders() {
    locked made-folders remove_made_folders_here
}

remove_made_folders_here() {
    local list=$DYAD_CACHE/made-folders folder
    [ -e "$list" ] || return 0
    while read -r folder; do
        # One program and no pipe: with pipefail, a `cat` whose reader has found the line ends as a failure, and the
        # folder of an environment that is up would count as unused.
        if [ -d "$folder" ] && ! grep -qsF " $folder " /proc/[0-9]*/mountinfo; then
            rmdir "$folder" 2>/dev/null || true
        fi
        [ ! -d "$folder" ] || printf '%s\n' "$folder"
    done < <(sort -u "$list") >"$list.new"
    mv "$list.new" "$list"
}
