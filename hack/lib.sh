# shellcheck shell=bash
# Shared by every command in hack/. Source it; it defines functions and settings and changes nothing by itself.
set -Eeuo pipefail
shopt -s inherit_errexit
# A command that fails without a word of its own still says where; `die` has said it.
trap '[ $? = 3 ] || printf "%s: %s:%s: failed: %s\n" "${0##*/}" "${BASH_SOURCE[0]##*/}" "$LINENO" "$BASH_COMMAND" >&2' ERR

DYAD_REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DYAD_CACHE=${DYAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dyad}
DYAD_DEFAULT_DIR=/tmp/dyad
export DYAD_REPO DYAD_CACHE DYAD_DEFAULT_DIR

# outside_environments PATH: that search path without the bin folders of environments. `hack/up` puts links to the tools
# there, so they are never taken for the host's own.
outside_environments() {
    local folder result=''
    while read -r -d: folder; do
        [ -e "$(dirname "$folder")/.dyad-environment" ] || result+=${result:+:}$folder
    done <<<"$1:"
    printf '%s\n' "$result"
}
PATH=$(outside_environments "$PATH")
# Nor do the exports of one environment speak for another: crictl heeds these before its own options.
unset CONTAINER_RUNTIME_ENDPOINT IMAGE_SERVICE_ENDPOINT CRI_CONFIG_FILE CONTAINERD_ADDRESS CONTAINERD_NAMESPACE \
    LIBVIRT_DEFAULT_URI DYAD_CONFIG DYAD_STATE_DIR

# stdout of some commands is meant for eval, so everything for people goes to stderr.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "error: $*"; exit 3; }

# Prints the comment block at the top of the calling script: that block is its --help.
usage() { sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p}' "$0"; }

have() { command -v "$1" >/dev/null 2>&1; }

require_root() {
    [ "$(id -u)" = 0 ] || die "$1 needs root (namespaces, mounts, taps and cgroups): run it with sudo -E"
}

# One writer at a time: `locked NAME COMMAND...` waits for the lock NAME in the cache. The descriptor is closed
# for the command, so that a daemon it leaves behind does not keep the lock.
locked() {
    local name=$1
    shift
    mkdir -p "$DYAD_CACHE"
    (
        flock 9
        "$@" 9>&-
    ) 9>"$DYAD_CACHE/$name.lock"
}

# Debian's packages. Sorted by what needs them: the Rust build, the guest build, the machines, the tests.
DYAD_PACKAGES=(
    build-essential pkg-config libvirt-dev libseccomp-dev libelf-dev zlib1g-dev
    cpio kmod lz4 zstd
    qemu-system-x86 qemu-utils libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients erofs-utils e2fsprogs
    iproute2 busybox-static tini util-linux procps
)

package_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# Installs what is missing of the packages named (all of DYAD_PACKAGES without a name). libvirt's own services
# package (libvirt-daemon-system) is not among them: nothing is started on the host.
install_packages() {
    local missing=() p
    [ $# -gt 0 ] || set -- "${DYAD_PACKAGES[@]}"
    if ! have dpkg-query; then
        say "not a Debian system; make sure that these are installed: $*"
        return
    fi
    for p in "$@"; do
        package_installed "$p" || missing+=("$p")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! have apt-get || [ "$(id -u)" != 0 ]; then
        die "missing packages (install them as root, then run this again): ${missing[*]}"
    fi
    say "installing ${missing[*]}"
    apt_update
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
}

apt_update() {
    # The lists of the last hour are good enough.
    if [ -z "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -mmin -60 -print -quit 2>/dev/null)" ]; then
        apt-get update -q >&2
    fi
}

# debian_version PACKAGE: the version apt would install, or nothing.
debian_version() {
    apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n 's/^Version: //p' | head -n1
}

# Unpacks a Debian package into the cache without installing it, and prints the folder. The folder is named
# after the version apt found, so a new version is fetched beside the old one.
debian_package() {
    have apt-get || die "no apt-get here, and $1 comes from Debian"
    if [ -z "$(debian_version "$1")" ]; then apt_update; fi
    locked deb unpack_debian_package "$1"
}

unpack_debian_package() {
    local name=$1 version folder work attempt
    work=$(mktemp -d)
    # apt drops its rights to a user that must be able to write here.
    chmod 0777 "$work"
    for attempt in 1 2; do
        version=$(debian_version "$name")
        [ -n "$version" ] || die "apt knows no package $name"
        folder=$DYAD_CACHE/deb/${name}_${version//[:\/]/_}
        if [ -e "$folder/.complete" ]; then break; fi
        say "fetching Debian's $name $version"
        if (cd "$work" && apt-get download -q "$name=$version" >&2); then
            rm -rf "$folder"
            mkdir -p "$folder"
            dpkg -x "$work"/*.deb "$folder"
            touch "$folder/.complete"
            break
        fi
        # An old list names a version that the archive has replaced since.
        [ "$attempt" = 1 ] || die "could not fetch $name $version"
        apt-get update -q >&2
    done
    rm -rf "$work"
    printf '%s\n' "$folder"
}

require_cargo() {
    have cargo || die "cargo is missing: get Rust from https://rustup.rs (or your distribution's rustup package)"
}

require_go() {
    have go || die "go is missing, and it is needed to build $1: get Go 1.26 or newer from https://go.dev/dl"
}

# shellcheck source=hack/lib/tools.sh
. "$DYAD_REPO/hack/lib/tools.sh"
# shellcheck source=hack/lib/debian.sh
. "$DYAD_REPO/hack/lib/debian.sh"
# shellcheck source=hack/lib/criu.sh
. "$DYAD_REPO/hack/lib/criu.sh"
