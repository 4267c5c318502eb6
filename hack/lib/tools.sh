# shellcheck shell=bash
# The foreign programs, pinned by one Go module each (hack/tools/<module>, committed with go.sum) and built into
# $DYAD_CACHE/<module>-<hash of go.sum>, never into the tree or the system.

# tool_packages MODULE: the Go packages that are built from that module.
tool_packages() {
    case $1 in
    containerd-2.*) printf 'github.com/containerd/containerd/v2/cmd/%s\n' containerd ctr containerd-shim-runc-v2 ;;
    containerd-1.7) printf 'github.com/containerd/containerd/cmd/%s\n' containerd ctr containerd-shim-runc-v2 ;;
    crictl) printf 'sigs.k8s.io/cri-tools/cmd/crictl\n' ;;
    runc) printf 'github.com/opencontainers/runc\n' ;;
    cni) printf 'github.com/containernetworking/plugins/plugins/%s\n' main/bridge main/loopback ipam/host-local meta/portmap ;;
    kubernetes) printf 'k8s.io/kubernetes/cmd/%s\n' kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl ;;
    # go names it after the folder above the version: server.
    etcd) printf 'go.etcd.io/etcd/server/v3\n' ;;
    metrics-server) printf 'sigs.k8s.io/metrics-server/cmd/metrics-server\n' ;;
    *) die "no such tool module: $1" ;;
    esac
}

# tool_flags MODULE: flags of `go build` for that module, one a line.
tool_flags() {
    case $1 in
    runc) printf '%s\n' -tags=seccomp ;;
    crictl) printf '%s\n' -ldflags='-X sigs.k8s.io/cri-tools/pkg/version.Version=1.36.0' ;;
    containerd-2.3) printf '%s\n' -ldflags='-X github.com/containerd/containerd/v2/version.Version=2.3.4' ;;
    containerd-2.1) printf '%s\n' -ldflags='-X github.com/containerd/containerd/v2/version.Version=2.1.5' ;;
    containerd-1.7) printf '%s\n' -ldflags='-X github.com/containerd/containerd/version.Version=1.7.29' ;;
    kubernetes) printf '%s\n' -ldflags='-s -w -X k8s.io/component-base/version.gitVersion=v1.36.0' ;;
    etcd | metrics-server) printf '%s\n' -ldflags='-s -w' ;;
    esac
}

tool_folder() {
    local module=$DYAD_REPO/hack/tools/$1
    printf '%s/%s-%s\n' "$DYAD_CACHE" "$1" "$(cat "$module/go.mod" "$module/go.sum" | sha256sum | cut -c1-16)"
}

# go_tool MODULE: builds the module's programs unless they are there, and prints the folder they are in.
go_tool() {
    local folder
    folder=$(tool_folder "$1")
    [ -e "$folder/.complete" ] || locked "$1" build_go_tool "$1" "$folder"
    printf '%s\n' "$folder"
}

build_go_tool() {
    local module=$1 folder=$2 flags packages
    [ ! -e "$folder/.complete" ] || return 0
    require_go "$module"
    say "building $module from its pinned Go module"
    mapfile -t flags < <(tool_flags "$module")
    mapfile -t packages < <(tool_packages "$module")
    mkdir -p "$folder"
    # Static where the host's C library is not needed.
    case $module in kubernetes | etcd | metrics-server) export CGO_ENABLED=0 ;; esac
    (cd "$DYAD_REPO/hack/tools/$module" &&
        nice -n 10 go build -trimpath "${flags[@]}" -o "$folder/" "${packages[@]}" >&2)
    touch "$folder/.complete"
}

# critest comes as a test binary from crictl's module. Only the conformance runs want it.
critest() {
    local folder
    folder=$(tool_folder crictl)
    if [ ! -e "$folder/critest" ]; then
        require_go critest
        mkdir -p "$folder"
        (cd "$DYAD_REPO/hack/tools/crictl" &&
            nice -n 10 go test -trimpath -c -o "$folder/critest" sigs.k8s.io/cri-tools/cmd/critest >&2)
    fi
    printf '%s\n' "$folder/critest"
}

# host_version PROGRAM: the version of the host's own PROGRAM, or nothing.
host_version() {
    have "$1" && "$1" --version 2>/dev/null | grep -oE 'v?[0-9]+\.[0-9]+\.[0-9]+' | head -n1 | tr -d v
}

# host_containerd: minor version of the host's containerd if it is a 2.1 or newer with its programs beside it, else
# nothing. (2.0 knows no `bin_dirs`.)
host_containerd() {
    local version folder
    version=$(host_version containerd) || return 0
    folder=$(dirname "$(command -v containerd)")
    [ -x "$folder/ctr" ] && [ -x "$folder/containerd-shim-runc-v2" ] || return 0
    case $version in
    2.0.*) ;;
    2.*) printf '%s\n' "${version%.*}" ;;
    esac
}

# containerd_folder VERSION: a folder with containerd, ctr and the stock runc shim of that minor version.
# The host's own programs serve where they are of that version; their state is never used.
containerd_folder() {
    local folder
    if [ "$(host_containerd)" = "$1" ]; then
        dirname "$(command -v containerd)"
        return
    fi
    case $1 in
    1.6)
        case $(debian_version containerd) in
        1.6.*)
            folder=$(debian_package containerd)
            printf '%s/usr/bin\n' "$folder"
            ;;
        *) die "containerd 1.6 is Debian 12's package, and this system has another: run this on Debian 12" ;;
        esac
        ;;
    1.7 | 2.1 | 2.3) go_tool "containerd-$1" ;;
    *) die "no recipe for containerd $1: known are 1.6, 1.7, 2.1 and 2.3" ;;
    esac
}

# cni_folder: the host's CNI plugins if the ones we need are among them, else ours.
cni_folder() {
    local folder
    for folder in /opt/cni/bin /usr/lib/cni; do
        if [ -x "$folder/bridge" ] && [ -x "$folder/host-local" ] && [ -x "$folder/loopback" ] && [ -x "$folder/portmap" ]; then
            printf '%s\n' "$folder"
            return
        fi
    done
    go_tool cni
}

# crictl_path: crictl 1.30 or newer of the host, else ours.
crictl_path() {
    local version minor folder
    version=$(host_version crictl) || version=
    minor=${version#1.}
    if [ -n "$version" ] && [ "${minor%%.*}" -ge 30 ]; then
        command -v crictl
    else
        folder=$(go_tool crictl)
        printf '%s/crictl\n' "$folder"
    fi
}

# runc_path: runc 1.2 or newer of the host, else ours. Older ones (and Debian 12's crun) refuse specs of
# containerd 2.x or lack `features`.
runc_path() {
    local version minor folder
    version=$(host_version runc) || version=
    minor=${version#1.}
    if [ -n "$version" ] && [ "${minor%%.*}" -ge 2 ] && runc features >/dev/null 2>&1; then
        command -v runc
    else
        folder=$(go_tool runc)
        printf '%s/runc\n' "$folder"
    fi
}
