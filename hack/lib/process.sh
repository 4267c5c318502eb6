# shellcheck shell=bash
# Detached daemons of one environment, known by pid and start time, so that a pid that was given to somebody else
# is never signalled.

start_time() {
    # Field 22 of stat; the command name before it may hold spaces, so count from the last parenthesis.
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086
    set -- ${stat##*) }
    printf '%s\n' "${20}"
}

is_zombie() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) }
    [ "${stat%% *}" = Z ]
}

# start_daemon DIR NAME COMMAND...: runs the command in a session of its own below a reaping subreaper, in the
# environment's network, its output in DIR/log/NAME.log, its pid in DIR/pid/NAME. What the daemon leaves behind (shims, QEMU) becomes the subreaper's
# child: libvirt and the shims see an exit at once, also where the host's PID 1 reaps late.
start_daemon() {
    local dir=$1 name=$2 reaper pid='' enter=()
    shift 2
    if [ "$name" != node ] && is_node "$dir"; then
        enter=(nsenter --target "$(daemon_pid "$dir" node)" --mount --net --uts --)
    fi
    if has_own_network "$dir"; then enter=(nsenter --net="$dir/netns" --); fi
    DYAD_ENVIRONMENT=$dir setsid tini -s -- "${enter[@]}" "$@" >>"$dir/log/$name.log" 2>&1 </dev/null &
    reaper=$!
    for _ in $(seq 100); do
        pid=$(cat "/proc/$reaper/task/$reaper/children" 2>/dev/null || true)
        pid=${pid%% *}
        [ -z "$pid" ] || break
        kill -0 "$reaper" 2>/dev/null || break
        sleep 0.02
    done
    [ -n "$pid" ] || die "$name did not start: $(tail -n 3 "$dir/log/$name.log")"
    printf '%s %s\n' "$pid" "$(start_time "$pid")" >"$dir/pid/$name"
}

# mount_state DIR: what a host has in memory.
mount_state() {
    local state
    for state in "$1/dyad/run" "$1/containerd/state"; do
        mkdir -p "$state"
        mountpoint -q "$state" || mount -t tmpfs -o mode=0755 tmpfs "$state"
    done
}

# remove_mounts DIR: all below it.
remove_mounts() {
    local mount
    while read -r mount; do
        umount "$mount" 2>/dev/null || umount -l "$mount" 2>/dev/null || true
    done < <(awk -v dir="$1/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | sort -r)
}

# daemon_pid DIR NAME: the pid of that daemon if it is alive, else fails.
daemon_pid() {
    local pid started
    read -r pid started 2>/dev/null <"$1/pid/$2" || return 1
    [ "$(start_time "$pid")" = "$started" ] && ! is_zombie "$pid" || return 1
    printf '%s\n' "$pid"
}

# stop_daemon DIR NAME: asks, waits, then kills.
stop_daemon() {
    local pid
    if pid=$(daemon_pid "$1" "$2"); then
        end_processes "$pid"
    fi
    rm -f "$1/pid/$2"
}

# end_processes PID...: SIGTERM, up to 10 s, then SIGKILL; returns when they are gone.
end_processes() {
    [ $# -gt 0 ] || return 0
    kill -TERM "$@" 2>/dev/null || true
    await_exit 100 "$@" && return
    say "killing what did not end by itself: $*"
    kill -KILL "$@" 2>/dev/null || true
    await_exit 50 "$@" || say "still there: $*"
}

# await_exit TENTHS PID...: waits until all are gone (or zombies that only their parent can remove).
await_exit() {
    local tenths=$1 i pid alive
    shift
    for ((i = 0; i < tenths; i++)); do
        alive=
        for pid in "$@"; do
            if [ -e "/proc/$pid" ] && ! is_zombie "$pid"; then alive=1; fi
        done
        [ -n "$alive" ] || return 0
        sleep 0.1
    done
    return 1
}

# environment_processes DIR: pids of everything that the environment's daemons left: what carries its mark in the
# process environment (shims, helpers), and what has its root on one of its mounts (containers).
environment_processes() {
    local dir=$1 proc pid
    for proc in /proc/[0-9]*; do
        pid=${proc#/proc/}
        if [ "$pid" = $$ ] || [ "$pid" = "$BASHPID" ]; then continue; fi
        if grep -zqsxF "DYAD_ENVIRONMENT=$dir" "$proc/environ" ||
            awk -v dir="$dir/" '$5 == "/" && index($0, dir) { found = 1 } END { exit !found }' "$proc/mountinfo" 2>/dev/null; then
            is_zombie "$pid" || printf '%s\n' "$pid"
        fi
    done
}
