# shellcheck shell=bash
# Nodes: environments in network, mount and UTS namespaces of their own, all on one L2, so that one host has several
# hosts to migrate between. DIR/node holds "PARENT NUMBER" where DIR is a node; a process `node` keeps its namespaces.
#
#     host:  bridge dyadHASH (subnet.1)  --veth-- node 1: bridge dyad0 (subnet.2) --veth-- its pods (.16 to .127)
#                                        --veth-- node 2: bridge dyad0 (subnet.3) --veth-- its pods (.128 to .250)

NODE_BRIDGE=dyad0

is_node() { [ -e "$1/node" ]; }

# in_node DIR COMMAND...: in the node's namespaces; plainly where DIR is no node.
in_node() {
    local dir=$1 pid
    shift
    if is_node "$dir"; then
        pid=$(daemon_pid "$dir" node) || die "$dir: its namespaces are gone: run hack/down, then hack/up again"
        nsenter --target "$pid" --mount --net --uts -- "$@"
    else
        "$@"
    fi
}

# node_name DIR NUMBER: its host name; two nodes must differ in it.
node_name() { printf 'node%s-%s\n' "$2" "$(short_hash "$1")"; }

# start_node DIR: makes the namespaces, unless they are there.
start_node() {
    local dir=$1 number pid i
    ! daemon_pid "$dir" node >/dev/null || return 0
    read -r _ number <"$dir/node"
    # shellcheck disable=SC2016
    start_daemon "$dir" node unshare --mount --net --uts --propagation slave \
        sh -c 'hostname "$1" && ip link set lo up && touch "$2" && exec sleep infinity' node "$(node_name "$dir" "$number")" "$dir/pid/node.ready"
    pid=$(daemon_pid "$dir" node) || die "the namespaces of $dir did not come up"
    for ((i = 0; i < 100; i++)); do
        [ ! -e "$dir/pid/node.ready" ] || break
        sleep 0.05
    done
    [ -e "$dir/pid/node.ready" ] || die "the namespaces of $dir did not come up: $(tail -n 3 "$dir/log/node.log")"
    rm "$dir/pid/node.ready"
}

# start_node_network DIR: the node's bridge and its cable to the others.
start_node_network() {
    local dir=$1 parent number bridge subnet cable
    read -r parent number <"$dir/node"
    bridge=$(bridge_name "$parent")
    if ! ip link show "$bridge" >/dev/null 2>&1; then
        subnet=$(free_subnet "$parent")
        ip link add "$bridge" address "$(fixed_mac "$parent")" type bridge
        ip addr add "$subnet.1/24" dev "$bridge"
        ip link set "$bridge" mtu 1450 up
        printf '%s\n' "$subnet" >"$parent/subnet"
    fi
    subnet=$(cat "$parent/subnet")
    if ! in_node "$dir" ip link show "$NODE_BRIDGE" >/dev/null 2>&1; then
        cable=dy$(short_hash "$parent")$number
        ip link add "$cable" mtu 1450 type veth peer name up0 mtu 1450 netns "$(daemon_pid "$dir" node)"
        ip link set "$cable" master "$bridge" up
        in_node "$dir" ip link add "$NODE_BRIDGE" address "$(fixed_mac "$dir")" type bridge
        in_node "$dir" ip link set up0 master "$NODE_BRIDGE" up
        in_node "$dir" ip addr add "$subnet.$((number + 1))/24" dev "$NODE_BRIDGE"
        in_node "$dir" ip link set "$NODE_BRIDGE" mtu 1450 up
        in_node "$dir" ip route add default via "$subnet.1"
    fi
    # libvirt looks its own host's name up at each step of a migration: without an answer, each takes many seconds.
    if [ ! -e "$dir/hosts" ]; then
        cp /etc/hosts "$dir/hosts"
        for number in 1 2; do
            printf '%s.%s %s\n' "$subnet" "$((number + 1))" "$(node_name "$parent/n$number" "$number")" >>"$dir/hosts"
        done
        read -r parent number <"$dir/node"
        in_node "$dir" mount --bind "$dir/hosts" /etc/hosts
    fi
    write_conflist "$dir" "$NODE_BRIDGE" "$subnet" "\"rangeStart\": \"$subnet.$((number == 1 ? 16 : 128))\", \"rangeEnd\": \"$subnet.$((number == 1 ? 127 : 250))\", "
}

# wrap_crictl DIR PROGRAM: containerd's streaming server (exec, attach) listens on the node's own loopback.
wrap_crictl() {
    local dir=$1 program=$2
    rm -f "$dir/bin/crictl"
    cat >"$dir/bin/crictl" <<SH
#!/bin/sh
read -r pid _ <"$dir/pid/node"
exec nsenter --target "\$pid" --net -- "$program" "\$@"
SH
    chmod 0755 "$dir/bin/crictl"
}

# up_nodes DIR COUNT ARGUMENT...: hack/up for each node. Prints where each node's exports are.
up_nodes() {
    local parent=$1 count=$2 number dir built=()
    shift 2
    [ "$count" = 2 ] || die "--nodes $count: two nodes are what there is"
    mkdir -p "$parent"
    touch "$parent/.dyad-nodes"
    allow_post_copy "$parent"
    umask 0022
    # Before any node's namespace is made: each sees the others' sockets, which unix:// streams connect to.
    for ((number = 1; number <= count; number++)); do mount_state "$parent/n$number"; done
    for ((number = 1; number <= count; number++)); do
        dir=$parent/n$number
        mkdir -p "$dir"
        printf '%s %s\n' "$parent" "$number" >"$dir/node"
        "$DYAD_REPO/hack/up" --dir "$dir" "$@" "${built[@]}" >"$parent/n$number.env"
        built=(--no-build)
        printf 'export DYAD_NODE%s=%q\n' "$number" "$dir"
    done
    say "each node's exports: . $parent/n1.env, . $parent/n2.env"
}

# QEMU fetches memory after the switch by userfaultfd, as an unprivileged user. The knob is the host's: it is set back
# when the last environment that wanted it goes.
DYAD_USERFAULTFD=/proc/sys/vm/unprivileged_userfaultfd

# allow_post_copy PARENT
allow_post_copy() { locked userfaultfd allow_post_copy_here "$1"; }

allow_post_copy_here() {
    local users=$DYAD_CACHE/userfaultfd
    [ -w "$DYAD_USERFAULTFD" ] || return 0
    if [ "$(cat "$DYAD_USERFAULTFD")" = 0 ]; then
        say "setting vm.unprivileged_userfaultfd=1, for post-copy migration (hack/down sets it back)"
        echo 1 >"$DYAD_USERFAULTFD"
    elif [ ! -s "$users" ]; then
        return 0
    fi
    grep -qsxF "$1" "$users" || printf '%s\n' "$1" >>"$users"
}

# forbid_post_copy PARENT
forbid_post_copy() { locked userfaultfd forbid_post_copy_here "$1"; }

forbid_post_copy_here() {
    local users=$DYAD_CACHE/userfaultfd folder
    [ -s "$users" ] || return 0
    while read -r folder; do
        if [ "$folder" != "$1" ] && [ -e "$folder/.dyad-nodes" ]; then printf '%s\n' "$folder"; fi
    done <"$users" >"$users.new"
    mv "$users.new" "$users"
    if [ ! -s "$users" ]; then echo 0 >"$DYAD_USERFAULTFD" || true; fi
}

# down_nodes DIR: every node, then what they shared.
down_nodes() {
    local parent=$1 dir
    for dir in "$parent"/n[12]; do
        [ ! -d "$dir" ] || "$DYAD_REPO/hack/down" --dir "$dir"
    done
    ip link delete "$(bridge_name "$parent")" 2>/dev/null || true
    forbid_post_copy "$parent"
    # A node that never came up has its state mounted already.
    remove_mounts "$parent"
    rm -rf "$parent"
    say "down: $parent"
}
