//! Kernel modules that the kernel asks for, and devices that want one.

use dyad_agent_api::ttrpc::Code;
use serde_json::{Value, json};

use crate::guest::{code, on_machine, text};

/// Gives the container a character device.
fn add_device(spec: &mut Value, path: &str, (major, minor): (u32, u32)) {
    let linux = &mut spec["linux"];
    let device =
        json!({"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666});
    match linux["devices"].as_array_mut() {
        Some(devices) => devices.push(device),
        None => linux["devices"] = json!([device]),
    }
    let rule = json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
    linux["resources"]["devices"]
        .as_array_mut()
        .unwrap()
        .push(rule);
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn devices_that_are_given_open_and_others_do_not() {
    on_machine(|machine| async move {
        let script = "true <>/dev/vpn && echo tun; true <>/dev/fuse && echo fuse; \
            mknod /dev/kmsg2 c 1 11 && true </dev/kmsg2; echo tried";
        let container = machine
            .create_with("devices", &["sh", "-c", script], |spec, _| {
                add_device(spec, "/dev/vpn", (10, 200));
                add_device(spec, "/dev/fuse", (10, 229));
            })
            .await
            .unwrap();
        container.start().await;
        assert_eq!(container.read_until("tried").await, "tun\nfuse\ntried\n");
        assert!(container.read_stderr().await.contains("/dev/kmsg2"));
        container.wait().await;
        container.delete().await;
        let refused = machine
            .create_with("devices", &["true"], |spec, _| {
                add_device(spec, "/dev/odd", (10, 77));
            })
            .await
            .map(|_| ())
            .unwrap_err();
        assert_eq!(code(&refused), Code::INVALID_ARGUMENT);
        assert!(text(&refused).contains("/dev/odd"), "{}", text(&refused));
    });
}

#[test]
#[ignore = "needs DYAD_GUEST and QEMU"]
fn the_kernel_finds_the_modules_it_asks_for() {
    on_machine(|machine| async move {
        let script = "for kind in bridge wireguard; do \
            ip link add test0 type $kind && ip link del test0 && echo $kind; done; \
            ls /sys/module/ip_tables /sys/module/ip6_tables >/dev/null && echo iptables; \
            ip link add test0 type nonesuch 2>/dev/null || echo none";
        let container = machine
            .create_with("modules", &["sh", "-c", script], |spec, _| {
                for set in ["bounding", "effective", "permitted"] {
                    let set = &mut spec["process"]["capabilities"][set];
                    set.as_array_mut().unwrap().push(json!("CAP_NET_ADMIN"));
                }
            })
            .await
            .unwrap();
        container.start().await;
        assert_eq!(
            container.read().await,
            "bridge\nwireguard\niptables\nnone\n"
        );
        container.wait().await;
        container.delete().await;
    });
}
