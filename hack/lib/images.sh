# shellcheck shell=bash
# The test images, made of Debian's busybox-static and tini without any container tool: OCI image layouts in a
# tar each, for `ctr images import`.
#
#   dyad.test/busybox:1   a small usable userland: applets, /etc/passwd with root, nobody and user (1000), Cmd sh
#   dyad.test/pause:1     what a pod's sandbox runs: a reaping init over a sleep
#   dyad.test/multi:1     busybox in three layers with a whiteout and an opaque directory, see multi_image
#   dyad.test/noentry:1   busybox without Entrypoint and Cmd

DYAD_IMAGE_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# test_images: builds what is missing and prints the folder with the tars.
test_images() {
    local folder
    folder=$DYAD_CACHE/images-$(cat "$DYAD_REPO/hack/lib/images.sh" /bin/busybox /usr/bin/tini-static | sha256sum | cut -c1-16)
    [ -e "$folder/.complete" ] || locked images build_test_images "$folder"
    printf '%s\n' "$folder"
}

build_test_images() {
    local folder=$1 work
    [ ! -e "$folder/.complete" ] || return 0
    say "building the test images"
    mkdir -p "$folder"
    work=$(mktemp -d)
    busybox_root "$work/busybox"
    tar_layer "$work/busybox" "$work/busybox.tar"
    image "$folder/busybox.tar" dyad.test/busybox:1 '"Cmd":["sh"]' "$work/busybox.tar"
    image "$folder/noentry.tar" dyad.test/noentry:1 '' "$work/busybox.tar"
    pause_image "$folder/pause.tar" "$work"
    multi_image "$folder/multi.tar" "$work"
    rm -rf "$work"
    touch "$folder/.complete"
}

busybox_root() {
    local root=$1 applet
    mkdir -p "$root"/{bin,dev,etc,home/user,proc,root,sys,tmp,usr/local/bin,var/www}
    chmod 1777 "$root/tmp"
    chmod 0700 "$root/root"
    chown 1000:1000 "$root/home/user"
    cp /bin/busybox "$root/bin/busybox"
    for applet in $(/bin/busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
    done
    printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'nobody:x:65534:65534:nobody:/:/bin/false' \
        'user:x:1000:1000:user:/home/user:/bin/sh' >"$root/etc/passwd"
    printf '%s\n' 'root:x:0:' 'nogroup:x:65534:' 'user:x:1000:' 'extra:x:2000:user' >"$root/etc/group"
    printf 'dyad\n' >"$root/var/www/index.html"
}

pause_image() {
    local root=$2/pause
    mkdir -p "$root"/{bin,dev,proc,sys,tmp}
    cp /usr/bin/tini-static "$root/bin/tini"
    cp /bin/busybox "$root/bin/sleep"
    tar_layer "$root" "$2/pause.tar"
    image "$1" dyad.test/pause:1 '"Entrypoint":["/bin/tini","-s","--","/bin/sleep","2147483647"]' "$2/pause.tar"
}

# /layers in the finished root: one, two, three ("three"), changed ("new"), opaque/new, hardlink pair a and b, and
# link -> one. Gone are: gone (whiteout) and opaque/old (opaque directory).
multi_image() {
    local first=$2/first second=$2/second third=$2/third
    cp -a "$2/busybox" "$first"
    mkdir -p "$first/layers/opaque" "$second/layers/opaque" "$third/layers"
    printf 'one\n' >"$first/layers/one"
    printf 'old\n' >"$first/layers/changed"
    printf 'old\n' >"$first/layers/opaque/old"
    printf 'gone\n' >"$first/layers/gone"
    ln -s one "$first/layers/link"
    printf 'pair\n' >"$first/layers/a"
    ln "$first/layers/a" "$first/layers/b"
    printf 'two\n' >"$second/layers/two"
    printf 'new\n' >"$second/layers/opaque/new"
    : >"$second/layers/.wh.gone"
    : >"$second/layers/opaque/.wh..wh..opq"
    printf 'three\n' >"$third/layers/three"
    printf 'new\n' >"$third/layers/changed"
    chown 1000:1000 "$third/layers/three"
    chmod 0640 "$third/layers/three"
    tar_layer "$first" "$first.tar"
    tar_layer "$second" "$second.tar"
    tar_layer "$third" "$third.tar"
    image "$1" dyad.test/multi:1 '"Cmd":["sh"]' "$first.tar" "$second.tar" "$third.tar"
}

tar_layer() {
    tar --sort=name --numeric-owner --mtime=@1700000000 -C "$1" -cf "$2" .
}

digest() { sha256sum "$1" | cut -d' ' -f1; }

# add_blob LAYOUT FILE: copies the file in as a blob and prints its digest.
add_blob() {
    local sum
    sum=$(digest "$2")
    cp "$2" "$1/blobs/sha256/$sum"
    printf '%s\n' "$sum"
}

# image TAR NAME CONFIG-FIELDS LAYER...: layers are uncompressed, so a layer's digest is its diff id as well.
image() {
    local tar=$1 name=$2 fields=$3 layout layer sum layers='' diffs='' config manifest
    shift 3
    layout=$(mktemp -d)
    mkdir -p "$layout/blobs/sha256"
    for layer in "$@"; do
        sum=$(add_blob "$layout" "$layer")
        layers+=${layers:+,}$(descriptor application/vnd.oci.image.layer.v1.tar "$sum" "$layer")
        diffs+=${diffs:+,}\"sha256:$sum\"
    done
    printf '{"architecture":"%s","os":"linux","created":"2023-11-14T22:13:20Z","config":{"Env":["PATH=%s"]%s},"rootfs":{"type":"layers","diff_ids":[%s]}}' \
        "$(oci_architecture)" "$DYAD_IMAGE_PATH" "${fields:+,$fields}" "$diffs" >"$layout/config"
    config=$(add_blob "$layout" "$layout/config")
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' \
        "$(descriptor application/vnd.oci.image.config.v1+json "$config" "$layout/config")" "$layers" >"$layout/manifest"
    manifest=$(add_blob "$layout" "$layout/manifest")
    printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s","size":%s,"annotations":{"io.containerd.image.name":"%s"}}]}' \
        "$manifest" "$(stat -c %s "$layout/manifest")" "$name" >"$layout/index.json"
    printf '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
    rm "$layout/config" "$layout/manifest"
    tar -C "$layout" -cf "$tar" oci-layout index.json blobs
    rm -rf "$layout"
}

descriptor() {
    printf '{"mediaType":"%s","digest":"sha256:%s","size":%s}' "$1" "$2" "$(stat -c %s "$3")"
}

oci_architecture() {
    case $(uname -m) in
    aarch64) printf 'arm64\n' ;;
    *) printf 'amd64\n' ;;
    esac
}

# import_images DIR: into the environment's containerd, where they are missing; DIR/images is where they are from.
import_images() {
    local dir=$1 folder there tar
    local ctr=(env CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 "$dir/bin/ctr" --address "$dir/containerd/containerd.sock" -n k8s.io)
    folder=$(test_images)
    ln -sfn "$folder" "$dir/images"
    there=$("${ctr[@]}" images ls -q)
    for tar in "$folder"/*.tar; do
        if ! grep -qx "dyad.test/$(basename "$tar" .tar):1" <<<"$there"; then
            "${ctr[@]}" images import "$tar" >/dev/null
        fi
    done
}
