# shellcheck shell=bash
# The certificates and kubeconfigs of a cluster, in DIR/kubernetes: two authorities (the cluster's, and the one by which
# the API server proves itself to servers that extend it), made anew for every cluster.

# write_certificates DIR ADDRESS: all of them, for a node with that address.
write_certificates() {
    local dir=$1 address=$2 pki=$1/kubernetes/pki
    if [ -e "$pki/.complete" ]; then return; fi
    rm -rf "$pki"
    (
        umask 0077
        mkdir -p "$pki"
        authority "$pki" ca
        authority "$pki" front-proxy-ca
        openssl genrsa -out "$pki/service-accounts.key" 2048 2>/dev/null
        openssl rsa -in "$pki/service-accounts.key" -pubout -out "$pki/service-accounts.pub" 2>/dev/null
        server_certificate "$pki" kube-apiserver \
            "IP:$address,IP:127.0.0.1,IP:$SERVICE_NETWORK.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
        server_certificate "$pki" kubelet-server "IP:$address,DNS:$NODE_NAME"
        server_certificate "$pki" metrics-server DNS:metrics-server.kube-system.svc
        client_certificate "$pki" ca kube-apiserver-kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client
        client_certificate "$pki" front-proxy-ca front-proxy-client /CN=front-proxy-client
        kubeconfig "$dir" "$address" admin /O=system:masters/CN=kubernetes-admin
        kubeconfig "$dir" "$address" kube-controller-manager /CN=system:kube-controller-manager
        kubeconfig "$dir" "$address" kube-scheduler /CN=system:kube-scheduler
        kubeconfig "$dir" "$address" kubelet "/O=system:nodes/CN=system:node:$NODE_NAME"
        kubeconfig "$dir" "$address" metrics-server /CN=metrics-server
        touch "$pki/.complete"
    )
}

# authority PKI NAME: NAME.crt and NAME.key.
authority() {
    openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj "/CN=dyad-$2" \
        -addext keyUsage=critical,digitalSignature,keyCertSign,cRLSign \
        -keyout "$1/$2.key" -out "$1/$2.crt" 2>/dev/null
}

# certificate PKI AUTHORITY NAME SUBJECT EXTENSION...
certificate() {
    local pki=$1 authority=$2 name=$3 subject=$4
    shift 4
    openssl req -newkey rsa:2048 -nodes -subj "$subject" -keyout "$pki/$name.key" -out "$pki/$name.csr" 2>/dev/null
    openssl x509 -req -days 365 -in "$pki/$name.csr" -CA "$pki/$authority.crt" -CAkey "$pki/$authority.key" \
        -CAcreateserial -extfile <(printf '%s\n' "$@") -out "$pki/$name.crt" 2>/dev/null
    rm "$pki/$name.csr"
}

server_certificate() { certificate "$1" ca "$2" "/CN=$2" extendedKeyUsage=serverAuth "subjectAltName=$3"; }

client_certificate() { certificate "$1" "$2" "$3" "$4" extendedKeyUsage=clientAuth; }

# kubeconfig DIR ADDRESS NAME SUBJECT: DIR/kubernetes/NAME.conf, for a client of the API server at that address.
kubeconfig() {
    local dir=$1 address=$2 name=$3 subject=$4 pki=$1/kubernetes/pki
    client_certificate "$pki" ca "client-$name" "$subject"
    cat >"$dir/kubernetes/$name.conf" <<YAML
apiVersion: v1
kind: Config
clusters:
  - name: dyad
    cluster:
      server: https://$address:6443
      certificate-authority-data: $(base64 -w0 "$pki/ca.crt")
users:
  - name: $name
    user:
      client-certificate-data: $(base64 -w0 "$pki/client-$name.crt")
      client-key-data: $(base64 -w0 "$pki/client-$name.key")
contexts:
  - name: dyad
    context: {cluster: dyad, user: $name}
current-context: dyad
YAML
}
