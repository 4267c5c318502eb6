# shellcheck shell=bash
# Packages of another Debian suite, unpacked into the cache: with sources, lists and a status of their own, so that the
# system's apt knows nothing of them.

# apart WORK SUITE: makes ready in the folder WORK; then `in_suite apt-get|apt-cache ...` asks that suite.
apart() {
    local work=$1 suite=$2
    mkdir -p "$work"/{lists/partial,cache/archives/partial,deb}
    touch "$work/status"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian %s main\n' \
        "$suite" >"$work/sources.list"
    APART_OPTIONS=(-q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$work/lists" -o "Dir::State::status=$work/status" -o "Dir::Cache=$work/cache"
        -o APT::Sandbox::User=root -o Acquire::Languages=none)
    in_suite apt-get update
}

in_suite() {
    local program=$1
    shift
    "$program" "${APART_OPTIONS[@]}" "$@"
}

# suite_version PACKAGE: the suite's version of it, or nothing.
suite_version() { in_suite apt-cache policy "$1" | sed -n 's/^ *Candidate: //p'; }

# unpack_apart WORK ROOT PACKAGE...: downloads them and unpacks them below ROOT.
unpack_apart() {
    local work=$1 root=$2 package
    shift 2
    (cd "$work/deb" && in_suite apt-get download "$@")
    mkdir -p "$root"
    for package in "$work"/deb/*.deb; do dpkg -x "$package" "$root"; done
}
