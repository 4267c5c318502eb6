# shellcheck shell=bash
# CRIU, which checkpoints and restores containers that migrate. Debian 12 has none, so it comes from Debian's newest suite,
# with the libraries it was built for, into the cache: own sources, lists and status, so that the system's apt knows nothing.

DYAD_CRIU_SUITE=sid

# criu_path: a program named `criu`: the host's own of version 4 or newer, else ours.
criu_path() {
    local version
    version=$(criu --version 2>/dev/null | sed -n 's/^Version: \([0-9]*\).*/\1/p') || version=
    if [ -n "$version" ] && [ "$version" -ge 4 ]; then
        command -v criu
    else
        locked criu fetch_criu
    fi
}

# fetch_criu: prints the program's path. What was fetched once is kept, since a suite moves on: remove $DYAD_CACHE/criu-*
# to look for a newer one.
fetch_criu() {
    local folder
    folder=$(find "$DYAD_CACHE" -maxdepth 1 -name 'criu-*' -type d -exec test -e '{}/.complete' ';' -print | sort -V | tail -n1)
    if [ -z "$folder" ]; then
        have apt-get || die "no criu here, and no apt-get to fetch Debian's: install CRIU 4 or newer"
        unpack_criu >&2
        folder=$(cat "$DYAD_CACHE/criu.version")
    fi
    printf '%s/criu\n' "$folder"
}

unpack_criu() {
    local work version folder packages
    work=$(mktemp -d)
    apart "$work" "$DYAD_CRIU_SUITE"
    version=$(suite_version criu)
    [ -n "$version" ] || die "Debian $DYAD_CRIU_SUITE has no criu"
    say "fetching Debian $DYAD_CRIU_SUITE's criu $version"
    # Nothing of these is ever loaded: conversions between character sets, compilers' texts.
    mapfile -t packages < <(in_suite apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances criu | grep '^[a-z]' | grep -v -e '^libc-gconv' -e '^gcc-' | sort -u)
    folder=$DYAD_CACHE/criu-${version//[:\/]/_}
    rm -rf "$folder"
    unpack_apart "$work" "$folder/root" "${packages[@]}"
    cat >"$folder/criu" <<WRAPPER
#!/bin/sh
# Debian $DYAD_CRIU_SUITE's criu $version with its own C library.
root=$folder/root
lib=\$root/usr/lib/$(uname -m)-linux-gnu
exec "\$(ls "\$lib"/ld-linux-*.so.*)" --library-path "\$lib" "\$root/usr/sbin/criu" "\$@"
WRAPPER
    chmod 0755 "$folder/criu"
    "$folder/criu" --version | sed 's/^/criu: /'
    printf '%s\n' "$folder" >"$DYAD_CACHE/criu.version"
    touch "$folder/.complete"
    rm -rf "$work"
}
