# shellcheck shell=bash
# A QEMU whose emulated machines can migrate. Before 9.0, QEMU's software emulation loses stores of a guest that is
# being migrated (fixed by its commit 03bfc2188f, "physmem: Fix migration dirty bitmap coherency with TCG memory
# access"): the guest arrives with old pages among its memory, and hangs or crashes some time later. Debian 12 has 7.2,
# so nodes that machines migrate between get the one of its backports, which is built for its libraries.

DYAD_QEMU_SUITE=bookworm-backports
DYAD_QEMU_LEAST=9

# qemu_root: where a QEMU is unpacked that covers the host's; nothing where the host's own will do, or there is no other.
qemu_root() {
    local major
    major=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p')
    [ -n "$major" ] && [ "$major" -lt "$DYAD_QEMU_LEAST" ] || return 0
    if ! grep -qs '^VERSION_CODENAME=bookworm$' /etc/os-release; then
        say "this host's QEMU is older than $DYAD_QEMU_LEAST: without KVM, machines that migrate lose stores"
        return 0
    fi
    locked qemu fetch_qemu
}

# cover_qemu DIR: from its next start on, the environment's libvirtd finds that QEMU in the host's place.
cover_qemu() {
    local root
    root=$(qemu_root)
    if [ -n "$root" ]; then ln -sfn "$root" "$1/libvirt/qemu"; fi
}

# fetch_qemu: prints the folder. What was fetched once is kept: remove $DYAD_CACHE/qemu-* to look for a newer one.
fetch_qemu() {
    local folder
    folder=$(find "$DYAD_CACHE" -maxdepth 1 -name 'qemu-*' -type d -exec test -e '{}/.complete' ';' -print | sort -V | tail -n1)
    if [ -z "$folder" ]; then
        unpack_qemu >&2
        folder=$(find "$DYAD_CACHE" -maxdepth 1 -name 'qemu-*' -type d -exec test -e '{}/.complete' ';' -print | sort -V | tail -n1)
    fi
    printf '%s/root\n' "$folder"
}

unpack_qemu() {
    local work version folder
    work=$(mktemp -d)
    apart "$work" "$DYAD_QEMU_SUITE"
    version=$(suite_version qemu-system-x86)
    [ -n "$version" ] || die "Debian $DYAD_QEMU_SUITE has no QEMU"
    say "fetching Debian $DYAD_QEMU_SUITE's QEMU $version"
    folder=$DYAD_CACHE/qemu-${version//[:\/]/_}
    rm -rf "$folder"
    unpack_apart "$work" "$folder/root" qemu-system-x86 qemu-system-common qemu-system-data seabios
    "$folder/root/usr/bin/qemu-system-x86_64" --version | sed 1q
    touch "$folder/.complete"
    rm -rf "$work"
}
