//! Who a pod is, on every node.

use uuid::Uuid;

/// Namespace of the identities: `dyad`, and the machines for which they were made first.
const PODS: Uuid = Uuid::from_u128(0x6479_6164_0000_5000_8000_6d61_6368_696e);

/// The identity of a pod, which its machine has as UUID, and which the target of its
/// migration names in the annotation `dyad.dev/migration-source`. It is made of the names
/// alone, so making it twice makes one, and a crash leaves nothing unnamed.
pub fn pod_uuid(containerd_namespace: &str, sandbox_id: &str) -> Uuid {
    let name = format!("{containerd_namespace}/{sandbox_id}");
    Uuid::new_v5(&PODS, name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_stable_and_nobody_elses() {
        let uuid = pod_uuid("k8s.io", "s1");
        assert_eq!(uuid, pod_uuid("k8s.io", "s1"));
        assert_ne!(uuid, pod_uuid("k8s.io", "s2"));
        assert_ne!(uuid, pod_uuid("moby", "s1"));
        // Records, domains and annotations on other nodes have it.
        assert_eq!(uuid.to_string(), "875d0e29-2b21-5b64-8bd8-bd9dc3a2b1e2");
    }
}
