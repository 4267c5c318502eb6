# shellcheck shell=bash
# The machine of hack/vm: Debian's disk, the medium that Dyad is installed from, start, and the channel into it.

# What such a node has of Debian. Recommended packages are left out, so what they would bring of what matters is named.
DYAD_VM_PACKAGES=(
    linux-image-cloud-amd64 initramfs-tools zstd
    systemd systemd-sysv systemd-container dbus udev apparmor kmod procps util-linux
    libvirt-daemon-system libvirt-clients qemu-system-x86 erofs-utils e2fsprogs
    iproute2 iptables nftables libseccomp2 ca-certificates crun
    python3 bpftool jq strace less
)

# vm_base SUITE: makes the disk of that Debian unless it is there; prints the folder with disk.img, vmlinuz, initrd.img.
vm_base() {
    local hash folder
    hash=$({ declare -f make_vm_base && printf '%s\n' "${DYAD_VM_PACKAGES[@]}" && cat "$DYAD_REPO"/hack/lib/vm/debian/*; } | sha256sum | cut -c1-16)
    folder=$DYAD_CACHE/vm-$1-$hash
    [ -e "$folder/.complete" ] || locked vm make_vm_base "$1" "$folder" >&2
    printf '%s\n' "$folder"
}

make_vm_base() {
    local suite=$1 folder=$2 root=$2/root packages
    [ ! -e "$folder/.complete" ] || return 0
    say "making a disk of Debian $suite"
    rm -rf "$folder"
    mkdir -p "$folder"
    packages=$(IFS=, && printf '%s' "${DYAD_VM_PACKAGES[*]}")
    TMPDIR=$folder nice -n 5 mmdebstrap --quiet --variant=minbase --include="$packages" \
        --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' "$suite" "$root"
    install -m 0755 "$DYAD_REPO/hack/lib/vm/debian/channel-agent" "$root/usr/local/sbin/"
    install -m 0644 "$DYAD_REPO/hack/lib/vm/debian/channel-agent.service" "$root/etc/systemd/system/"
    chroot "$root" systemctl --quiet enable channel-agent.service
    chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer
    : >"$root/etc/machine-id"
    : >"$root/etc/fstab"
    printf 'node\n' >"$root/etc/hostname"
    printf '127.0.0.1 localhost node\n' >"$root/etc/hosts"
    cp -L "$(echo "$root"/boot/vmlinuz-*)" "$folder/vmlinuz"
    cp -L "$(echo "$root"/boot/initrd.img-*)" "$folder/initrd.img"
    truncate -s 12G "$folder/disk.img"
    mke2fs -q -t ext4 -d "$root" "$folder/disk.img"
    rm -rf "$root"
    touch "$folder/.complete"
}

# vm_build PROFILE: what is built of Dyad for a node.
vm_build() {
    require_cargo
    say "building Dyad ($1)"
    (cd "$DYAD_REPO" && cargo build --quiet --profile "$1" -p dyad-shim -p dyad-container -p dyadctl --bins >&2)
    "$DYAD_REPO/hack/guest"
}

# vm_medium DIR PROFILE: DIR/medium.tar, which holds what is unpacked over / to make a Debian a node with Dyad.
vm_medium() {
    local dir=$1 built=$DYAD_REPO/target/$2 root=$1/medium folder images
    [ "$2" = release ] || built=$DYAD_REPO/target/debug
    [ -e "$built/containerd-shim-dyad-v2" ] || die "no programs of Dyad in $built: run this without --no-build"
    rm -rf "$root"
    mkdir -p "$root"/{usr/local/bin,opt/cni/bin,var/lib/dyad/guest,var/lib/dyad-images}
    folder=$(go_tool containerd-2.3)
    cp -L "$folder"/{containerd,ctr,containerd-shim-runc-v2} "$(crictl_path)" "$(runc_path)" \
        "$built"/{containerd-shim-dyad-v2,containerd-shim-dyad-machine-v2,dyad-tls,dyadctl} "$root/usr/local/bin/"
    folder=$(cni_folder)
    cp -L "$folder"/{bridge,host-local,loopback,portmap} "$root/opt/cni/bin/"
    cp "$DYAD_REPO"/target/guest-image/{vmlinux,initramfs.zst} "$root/var/lib/dyad/guest/"
    images=$(test_images)
    cp -L "$images"/{busybox,pause}.tar "$root/var/lib/dyad-images/"
    cp -r "$DYAD_REPO/hack/lib/vm/node/." "$root/"
    tar --owner=0 --group=0 -C "$root" -cf "$dir/medium.tar" .
    rm -rf "$root"
}

# vm_start DIR BASE: boots the node and waits until its channel answers.
vm_start() {
    local dir=$1 base=$2
    rm -f "$dir"/{disk.qcow2,channel.sock}
    qemu-img create -q -f qcow2 -F raw -b "$base/disk.img" "$dir/disk.qcow2"
    say "booting it (its console: $dir/log/console)"
    start_daemon "$dir" node-vm nice -n 5 qemu-system-x86_64 -machine q35 -accel tcg,thread=multi,tb-size=1024 -cpu max \
        -smp 2 -m 6144 -nodefaults -no-user-config -display none \
        -kernel "$base/vmlinuz" -initrd "$base/initrd.img" \
        -append "root=/dev/vda rw console=ttyS0 mitigations=off nokaslr quiet systemd.unified_cgroup_hierarchy=1" \
        -drive "file=$dir/disk.qcow2,format=qcow2,if=virtio,cache=unsafe" \
        -drive "file=$dir/medium.tar,format=raw,if=virtio,readonly=on" \
        -object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
        -device virtio-serial-pci -chardev "socket,id=channel,path=$dir/channel.sock,server=on,wait=off" \
        -device virtserialport,chardev=channel,name=dyad.vm \
        -chardev "file,id=console,path=$dir/log/console" -serial chardev:console
    vm_run "$dir" true
}

# vm_run DIR COMMAND...: runs it as root in the node, with our stdin, and ends as it ended.
vm_run() {
    local dir=$1 pid
    shift
    pid=$(daemon_pid "$dir" node-vm) || die "no node runs in $dir: run hack/vm up"
    python3 "$DYAD_REPO/hack/lib/vm/channel" "$dir/channel.sock" "$pid" "$@"
}
