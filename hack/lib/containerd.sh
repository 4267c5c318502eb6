# shellcheck shell=bash
# The private containerd of one environment: its configuration, its network, its start.

# short_hash DIR: 8 hex digits that tell environments apart.
short_hash() { printf '%s' "$1" | sha256sum | cut -c1-8; }

# cluster_cgroup DIR: the cgroup below which the environment's kubelet keeps its pods.
cluster_cgroup() {
    local name=${1##*/}
    printf 'pods-of-%s\n' "${name//./-}"
}

bridge_name() { printf 'dyad%s\n' "$(short_hash "$1")"; }

# fixed_mac DIR: a bridge's address. Without one of its own a bridge takes the lowest of its ports' and so changes it as
# pods come and go; its neighbours then talk to the old one for up to a minute.
fixed_mac() { short_hash "$1" | sed 's/\(..\)\(..\)\(..\)\(..\)/02:64:\1:\2:\3:\4/'; }

# free_subnet DIR: a /24 that nothing on this host routes to, the same for the same DIR if it can be; "10.X.Y".
free_subnet() {
    local seed i subnet
    seed=$((16#$(short_hash "$1") % 16128))
    for ((i = 0; i < 256; i++)); do
        subnet=10.$((192 + (seed + i) % 16128 / 256)).$(((seed + i) % 256))
        if ! grep -qF "$subnet." <(ip -4 route show root 10.0.0.0/8); then
            printf '%s\n' "$subnet"
            return
        fi
    done
    die "no free subnet in 10.192.0.0/10"
}

# make_own_network DIR: a network namespace for the environment, held by a mount on DIR/netns. What hack/up starts runs
# in it where it is there, see `in_network`.
make_own_network() {
    if [ -e "$1/netns" ]; then return; fi
    touch "$1/netns"
    unshare --net="$1/netns" ip link set lo up
}

has_own_network() { [ -e "$1/netns" ]; }

# in_network DIR COMMAND...: runs the command in the environment's network. Not by `ip netns exec`, which mounts a /sys
# without cgroups.
in_network() {
    local dir=$1
    shift
    if has_own_network "$dir"; then
        nsenter --net="$dir/netns" -- "$@"
    else
        "$@"
    fi
}

# link_to_host DIR BRIDGE SUBNET: a cable from the bridge in the environment's own network to the host, which is
# SUBNET.254 there and so reaches pods and daemons by their addresses.
link_to_host() {
    local dir=$1 bridge=$2 subnet=$3
    ip link add "$bridge" mtu 1450 type veth peer name host netns "$dir/netns"
    ip addr add "$subnet.254/24" dev "$bridge"
    ip link set "$bridge" up
    in_network "$dir" ip link set host master "$bridge" up
    # Nothing is beyond the host; Kubernetes' programs look for a default route to find the node's address.
    in_network "$dir" ip route add default via "$subnet.254"
}

# The bridge is made here and not by its CNI plugin, which would switch on the host's IP forwarding.
# An MTU that is not the usual one shows whether a pod really gets what CNI said.
write_network() {
    local dir=$1 bridge subnet range=''
    if is_node "$dir"; then
        start_node_network "$dir"
        return
    fi
    bridge=$(bridge_name "$dir")
    if ! in_network "$dir" ip link show "$bridge" >/dev/null 2>&1; then
        subnet=$(free_subnet "$dir")
        in_network "$dir" ip link add "$bridge" address "$(fixed_mac "$dir")" type bridge
        in_network "$dir" ip addr add "$subnet.1/24" dev "$bridge"
        in_network "$dir" ip link set "$bridge" mtu 1450 up
        if has_own_network "$dir"; then
            link_to_host "$dir" "$bridge" "$subnet"
            range="\"rangeEnd\": \"$subnet.250\", "
        fi
        write_conflist "$dir" "$bridge" "$subnet" "$range"
    fi
}

# write_conflist DIR BRIDGE SUBNET [RANGE]: CNI's configuration; RANGE narrows the addresses, as JSON members.
write_conflist() {
    local dir=$1 bridge=$2 subnet=$3 range=${4:-}
    cat >"$dir/etc/cni/net.d/10-dyad.conflist" <<JSON
{
  "cniVersion": "1.0.0",
  "name": "$bridge",
  "plugins": [
    {
      "type": "bridge", "bridge": "$bridge", "isGateway": false, "ipMasq": false, "hairpinMode": true, "mtu": 1450,
      "ipam": {
        "type": "host-local", "dataDir": "$dir/cni/ipam",
        "ranges": [[{"subnet": "$subnet.0/24", $range"gateway": "$subnet.1"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    }$(if have iptables || have nft; then printf ',\n    {"type": "portmap", "capabilities": {"portMappings": true}}'; fi)
  ]
}
JSON
}

# write_containerd_config DIR VERSION
write_containerd_config() {
    local dir=$1 version=$2
    {
        case $version in
        1.*) printf 'version = 2\n' ;;
        *) printf 'version = 3\n' ;;
        esac
        cat <<TOML
root = "$dir/containerd/root"
state = "$dir/containerd/state"
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
  address = "$dir/containerd/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = "$dir/containerd/opt"
TOML
        case $version in
        1.*) cri_config_v2 "$dir" ;;
        *)
            cri_config_v3 "$dir"
            # 2.1 takes no options of ours in this mode.
            case $version in 2.[012]) ;; *) sandboxed_tables "$dir" ;; esac
            ;;
        esac
    } >"$dir/etc/containerd.toml"
}

# containerd 1.x: one CRI plugin.
cri_config_v2() {
    local dir=$1 cri='plugins."io.containerd.grpc.v1.cri"'
    cat <<TOML

[$cri]
  sandbox_image = "dyad.test/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[$cri.cni]
  bin_dir = "$dir/cni/bin"
  conf_dir = "$dir/etc/cni/net.d"

[$cri.containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"
TOML
    runtime_tables "$dir" "$cri.containerd.runtimes"
}

# containerd 2.x: images, runtime and streaming are configured apart.
cri_config_v3() {
    local dir=$1 images='plugins."io.containerd.cri.v1.images"' runtime='plugins."io.containerd.cri.v1.runtime"'
    cat <<TOML

[$images]
  snapshotter = "overlayfs"
  [$images.pinned_images]
    sandbox = "dyad.test/pause:1"

[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[$runtime]
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true

[$runtime.cni]
  bin_dirs = ["$dir/cni/bin"]
  conf_dir = "$dir/etc/cni/net.d"

[$runtime.containerd]
  default_runtime_name = "runc"
TOML
    runtime_tables "$dir" "$runtime.containerd.runtimes"
}

# The runtime handlers, the same for every version: the stock shim to compare with, and Dyad's two kinds.
runtime_tables() {
    local dir=$1 table=$2 handler
    cat <<TOML

[$table.runc]
  runtime_type = "io.containerd.runc.v2"
  [$table.runc.options]
    BinaryName = "$dir/bin/runc"
    Root = "$dir/runc"
    SystemdCgroup = false
TOML
    for handler in dyad dyad-vm; do
        dyad_table "$table" "$handler" "$dir/etc/$handler.toml"
    done
    cat <<TOML

# Dyad in the place of containerd's own shim, with that one's options. It reads /etc/dyad/config.toml, if there is one.
[$table.dyad-runc]
  runtime_type = "io.containerd.runc.v2"
  runtime_path = "$dir/bin/containerd-shim-dyad-v2"
  [$table.dyad-runc.options]
    BinaryName = "$dir/bin/runc"
    Root = "$dir/runc"
TOML
}

# The same two kinds without a pause container: containerd asks the shim for the pod itself.
sandboxed_tables() {
    local dir=$1 table='plugins."io.containerd.cri.v1.runtime".containerd.runtimes' handler
    for handler in dyad dyad-vm; do
        dyad_table "$table" "$handler-sandboxed" "$dir/etc/$handler.toml" 'sandboxer = "shim"'
    done
}

# dyad_table TABLE HANDLER CONFIG [MORE]
dyad_table() {
    local table=$1 handler=$2 config=$3 more=${4:-}
    cat <<TOML

[$table.$handler]
  runtime_type = "io.containerd.dyad.v2"
  pod_annotations = ["dyad.dev/*"]
  container_annotations = ["dyad.dev/*"]${more:+
  $more}
  [$table.$handler.options]
    ConfigPath = "$config"
TOML
}

# write_dyad_config DIR: the configuration file of either handler.
write_dyad_config() {
    local dir=$1
    local annotations='"dyad.dev/disk", "dyad.dev/migration-init-containers", "dyad.dev/migration-source", "dyad.dev/vcpus"'
    cat >"$dir/etc/dyad.toml" <<TOML
kind = "container"
state_dir = "$dir/dyad/run"
cache_dir = "$dir/dyad/lib"
log_level = "${DYAD_LOG_LEVEL:-info}"

[container]
runtime = "$dir/bin/runc"

[annotations]
allow = [$annotations]
TOML
    cat >"$dir/etc/dyad-vm.toml" <<TOML
kind = "machine"
state_dir = "$dir/dyad/run"
cache_dir = "$dir/dyad/lib"
log_level = "${DYAD_LOG_LEVEL:-info}"

[container]
runtime = "$dir/bin/runc"

[machine]
libvirt_uri = "$(libvirt_uri "$dir")"
kernel = "$dir/guest/vmlinux"
initramfs = "$dir/guest/initramfs.zst"

[annotations]
allow = [$annotations]
TOML
}

# start_containerd DIR: starts it unless it runs, and waits until its CRI answers.
start_containerd() {
    local dir=$1
    if ! daemon_pid "$dir" containerd >/dev/null; then
        start_daemon "$dir" containerd env "PATH=$dir/bin:$PATH" "$dir/bin/containerd" --config "$dir/etc/containerd.toml"
    fi
    await "containerd's CRI" "$dir" containerd cri_ready "$dir"
}

cri_ready() {
    "$1/bin/crictl" --config "$1/etc/crictl.yaml" --timeout 2s info >/dev/null 2>&1
}

# await WHAT DIR DAEMON COMMAND...: until the command succeeds, two minutes at most; fails at once when the daemon died.
await() {
    local what=$1 dir=$2 daemon=$3 end=$((SECONDS + 120))
    shift 3
    while [ "$SECONDS" -lt "$end" ]; do
        if "$@"; then return 0; fi
        daemon_pid "$dir" "$daemon" >/dev/null || break
        sleep 0.1
    done
    tail -n 20 "$dir/log/$daemon.log" >&2
    die "$what did not come up; its log is $dir/log/$daemon.log"
}
