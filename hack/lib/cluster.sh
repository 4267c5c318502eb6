# shellcheck shell=bash
# One Kubernetes node in an environment of hack/up: what hack/cluster starts on top of containerd and libvirtd. All of
# it is below DIR/kubernetes, but for kubelet's own folder, DIR/kubelet.

# shellcheck disable=SC2034 # hack/cluster prints it.
KUBERNETES_VERSION=1.36.0
NODE_NAME=dyad-node
# No address in it leads anywhere: nothing translates them (no kube-proxy).
SERVICE_NETWORK=10.96.0

build_kubernetes() {
    go_tool kubernetes >/dev/null
    go_tool etcd >/dev/null
    go_tool metrics-server >/dev/null
}

link_kubernetes() {
    local dir=$1 folder program
    mkdir -p "$dir/kubernetes"
    folder=$(go_tool kubernetes)
    for program in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do
        ln -sfn "$folder/$program" "$dir/bin/$program"
    done
    folder=$(go_tool etcd)
    ln -sfn "$folder/server" "$dir/bin/etcd"
    folder=$(go_tool metrics-server)
    ln -sfn "$folder/metrics-server" "$dir/bin/metrics-server"
}

# node_address DIR: the bridge's, which pods have as their gateway.
node_address() {
    sed -n 's/.*"gateway": "\([0-9.]*\)".*/\1/p' "$1/etc/cni/net.d/10-dyad.conflist"
}

# kubectl_in DIR ARGUMENT...
kubectl_in() {
    local dir=$1
    shift
    "$dir/bin/kubectl" --kubeconfig "$dir/kubernetes/admin.conf" --cache-dir "$dir/kubernetes/cache" --request-timeout 20s "$@"
}

# start DIR NAME FLAG...: that program of Kubernetes, unless it runs.
start() {
    local dir=$1 name=$2
    shift 2
    daemon_pid "$dir" "$name" >/dev/null || start_daemon "$dir" "$name" "$dir/bin/$name" "$@"
}

start_control_plane() {
    local dir=$1 conf=$1/kubernetes pki=$1/kubernetes/pki
    # etcd listens on loopback of the environment's network, where no pod is.
    start "$dir" etcd --name node --data-dir "$conf/etcd" --log-level warn --unsafe-no-fsync \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
        --initial-cluster node=http://127.0.0.1:2380
    # The aggregator goes to metrics-server's endpoint itself: its Service's address leads nowhere.
    start "$dir" kube-apiserver --etcd-servers http://127.0.0.1:2379 --advertise-address "$(node_address "$dir")" \
        --secure-port 6443 --service-cluster-ip-range "$SERVICE_NETWORK.0/24" --endpoint-reconciler-type none \
        --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction --allow-privileged \
        --client-ca-file "$pki/ca.crt" --tls-cert-file "$pki/kube-apiserver.crt" --tls-private-key-file "$pki/kube-apiserver.key" \
        --service-account-issuer https://kubernetes.default.svc --service-account-key-file "$pki/service-accounts.pub" \
        --service-account-signing-key-file "$pki/service-accounts.key" \
        --kubelet-certificate-authority "$pki/ca.crt" --kubelet-preferred-address-types InternalIP \
        --kubelet-client-certificate "$pki/kube-apiserver-kubelet-client.crt" \
        --kubelet-client-key "$pki/kube-apiserver-kubelet-client.key" \
        --enable-aggregator-routing --requestheader-client-ca-file "$pki/front-proxy-ca.crt" \
        --requestheader-allowed-names front-proxy-client --requestheader-username-headers X-Remote-User \
        --requestheader-group-headers X-Remote-Group --requestheader-extra-headers-prefix X-Remote-Extra- \
        --proxy-client-cert-file "$pki/front-proxy-client.crt" --proxy-client-key-file "$pki/front-proxy-client.key"
    await "the API server" "$dir" kube-apiserver api_ready "$dir"
    # The autoscaler looks more often than in a cluster of the real world, where nobody waits for it.
    start "$dir" kube-controller-manager --kubeconfig "$conf/kube-controller-manager.conf" \
        --authentication-kubeconfig "$conf/kube-controller-manager.conf" --authorization-kubeconfig "$conf/kube-controller-manager.conf" \
        --bind-address 127.0.0.1 --leader-elect=false --use-service-account-credentials \
        --root-ca-file "$pki/ca.crt" --service-account-private-key-file "$pki/service-accounts.key" \
        --horizontal-pod-autoscaler-sync-period 5s --horizontal-pod-autoscaler-cpu-initialization-period 30s \
        --horizontal-pod-autoscaler-initial-readiness-delay 10s
    start "$dir" kube-scheduler --kubeconfig "$conf/kube-scheduler.conf" --authentication-kubeconfig "$conf/kube-scheduler.conf" \
        --authorization-kubeconfig "$conf/kube-scheduler.conf" --bind-address 127.0.0.1 --leader-elect=false
    # Without it the first Pod is refused.
    await "the default service account" "$dir" kube-controller-manager service_account_there "$dir"
    kubectl_in "$dir" apply -f "$DYAD_REPO/examples/runtimeclass.yaml" >/dev/null
}

api_ready() { kubectl_in "$1" get --raw /readyz >/dev/null 2>&1; }

service_account_there() { kubectl_in "$1" get serviceaccount default >/dev/null 2>&1; }

write_kubernetes_config() {
    local dir=$1 conf=$1/kubernetes
    cat >"$conf/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $conf/pki/ca.crt}
authorization: {mode: Webhook}
tlsCertFile: $conf/pki/kubelet-server.crt
tlsPrivateKeyFile: $conf/pki/kubelet-server.key
containerRuntimeEndpoint: unix://$dir/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$(cluster_cgroup "$dir")
failCgroupV1: false
failSwapOn: false
protectKernelDefaults: true
makeIPTablesUtilChains: false
oomScoreAdj: 0
enforceNodeAllocatable: []
# A development host is full and busy now and then; no pod is to be evicted for that.
evictionHard: {memory.available: "1Mi", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%", imagefs.inodesFree: "0%"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
podLogsDir: $dir/log/pods
volumePluginDir: $dir/kubelet/volume-plugins
resolvConf: $conf/resolv.conf
YAML
    # No server answers in the environment's network.
    printf 'options timeout:1 attempts:1\n' >"$conf/resolv.conf"
}

start_kubelet() {
    local dir=$1
    make_cluster_cgroup "$dir"
    mkdir -p "$dir"/{kubelet,log/pods,kubernetes/host}
    # What kubelet mounts for its pods is mounted for containerd and the shims as well.
    if ! mountpoint -q "$dir/kubelet"; then
        mount --bind "$dir/kubelet" "$dir/kubelet"
        mount --make-shared "$dir/kubelet"
    fi
    # The lock is that of remove_made_folders.
    locked made-folders start_kubelet_here "$dir"
    await "the node" "$dir" kubelet node_ready "$dir"
}

start_kubelet_here() {
    local dir=$1
    if ! daemon_pid "$dir" kubelet >/dev/null; then
        make_mount_point /var/lib/kubelet
        make_mount_point /var/log/containers
        start_daemon "$dir" kubelet env "PATH=$dir/bin:$PATH" unshare --mount --propagation unchanged \
            bash "$DYAD_REPO/hack/lib/kubelet-in-namespace" "$dir" --config "$dir/kubernetes/kubelet.yaml" \
            --kubeconfig "$dir/kubernetes/kubelet.conf" --root-dir "$dir/kubelet" --cert-dir "$dir/kubernetes/pki" \
            --hostname-override "$NODE_NAME" --node-ip "$(node_address "$dir")" --node-labels dyad.dev/containers=true,dyad.dev/machines=true
        await kubelet "$dir" kubelet kubelet_has_its_mounts "$dir"
    fi
}

# It becomes kubelet when they are made.
kubelet_has_its_mounts() {
    [ "$(cat "/proc/$(daemon_pid "$1" kubelet)/comm")" = kubelet ]
}

node_ready() {
    kubectl_in "$1" wait --for=condition=Ready --timeout 10s "node/$NODE_NAME" >/dev/null 2>&1
}

# Kubelet wants every controller there. A cgroup v1 cpuset without processors and memory nodes takes no process.
make_cluster_cgroup() {
    local name hierarchy file controller
    name=$(cluster_cgroup "$1")
    if [ -e /sys/fs/cgroup/cgroup.procs ]; then
        while read -r -d ' ' controller; do
            printf '+%s\n' "$controller" >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true
        done < <(tr '\n' ' ' </sys/fs/cgroup/cgroup.controllers)
        mkdir -p "/sys/fs/cgroup/$name"
        return
    fi
    for hierarchy in /sys/fs/cgroup/*/; do
        [ -e "$hierarchy/cgroup.procs" ] || continue
        mkdir -p "$hierarchy/$name"
        for file in cpuset.cpus cpuset.mems; do
            if [ -e "$hierarchy/$file" ]; then cat "$hierarchy/$file" >"$hierarchy/$name/$file"; fi
        done
    done
}

start_metrics_server() {
    local dir=$1 pki=$1/kubernetes/pki conf=$1/kubernetes/metrics-server.conf
    sed -e "s|ADDRESS|$(node_address "$dir")|" -e "s|AUTHORITY|$(base64 -w0 "$pki/ca.crt")|" \
        "$DYAD_REPO/hack/tools/metrics-server/manifest.yaml" | kubectl_in "$dir" apply -f - >/dev/null
    start "$dir" metrics-server --kubeconfig "$conf" --authentication-kubeconfig "$conf" --authorization-kubeconfig "$conf" \
        --secure-port 4443 --tls-cert-file "$pki/metrics-server.crt" --tls-private-key-file "$pki/metrics-server.key" \
        --kubelet-certificate-authority "$pki/ca.crt" --kubelet-preferred-address-types InternalIP --kubelet-request-timeout 8s --metric-resolution 10s
    await "the metrics API" "$dir" metrics-server metrics_ready "$dir"
}

metrics_ready() {
    kubectl_in "$1" wait --for=condition=Available --timeout 10s apiservice/v1beta1.metrics.k8s.io >/dev/null 2>&1
}
