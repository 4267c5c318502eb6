//! A pod has the network that CNI gave it, whatever runs it.

use anyhow::{Context as _, Result};
use dyad_e2e::forward::Forward;
use dyad_e2e::wait::until;
use serde_json::json;

use super::{Case, EVERY, case};
use crate::context::{Context, Handler, Pod, SOON, names, same};

pub const CASES: &[Case] = &[
    case!(two_containers_of_a_pod_talk_over_localhost).on(EVERY),
    case!(pods_reach_each_other_by_ping_and_tcp_both_ways).short(),
    case!(address_mac_mtu_and_routes_are_as_cni_gave_them).short(),
    case!(hostname_and_dns_are_as_the_pod_says).on(EVERY),
    case!(ports_are_forwarded_to_whatever_listens_on_the_pod_s_localhost).short(),
];

/// A web server on port 8080 that says `dyad`.
const SERVE: &str = "exec httpd -f -p 8080 -h /var/www";

/// Asks until it answers: the server may be a moment away. (Debian's static wget crashes.)
fn fetch(address: &str) -> String {
    let ask = format!("printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 5 {address} 8080");
    format!("until {ask} | grep '^dyad'; do usleep 100000; done")
}

fn two_containers_of_a_pod_talk_over_localhost(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let _server = pod.run(SERVE)?;
    same(
        "answer",
        pod.output_of(&fetch("127.0.0.1"))?.as_str(),
        "dyad\n",
    )
}

fn pods_reach_each_other_by_ping_and_tcp_both_ways(context: &Context<'_>) -> Result<()> {
    // The other one is a container pod, also where this one is a machine.
    let other = match context.handler {
        Handler::Runc => Handler::Runc,
        _ => Handler::Dyad,
    };
    let (this, other) = (
        context.pod()?,
        context.run_pod(other, context.pod_config())?,
    );
    let (_a, _b) = (this.run(SERVE)?, other.run(SERVE)?);
    let talk = |from: &Pod<'_>, to: &Pod<'_>| -> Result<()> {
        let ip = to.status()?.ip;
        let out = from.output_of(&format!("ping -c 3 -i 0.2 -w 20 {ip} && {}", fetch(&ip)))?;
        names(&out, &["3 packets received", "dyad\n"])
    };
    talk(&this, &other).context("from this pod to the other")?;
    talk(&other, &this).context("from the other pod to this")
}

fn address_mac_mtu_and_routes_are_as_cni_gave_them(context: &Context<'_>) -> Result<()> {
    let pod = context.pod()?;
    let status = pod.status()?;
    let cni = &status.all["info"]["cniResult"]["Interfaces"]["eth0"];
    let (mac, gateway) = (
        cni["Mac"].as_str().context("CNI told no MAC")?,
        cni["IPConfigs"][0]["Gateway"]
            .as_str()
            .context("CNI told no gateway")?,
    );
    let out = pod.output_of(
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip -4 -o addr show dev eth0; ip route; cat /sys/class/net/lo/operstate",
    )?;
    names(
        &out,
        &[
            &format!("{mac}\n1450\n"),
            &format!("inet {}/24", status.ip),
            &format!("default via {gateway} dev eth0"),
        ],
    )?;
    names(
        &pod.output_of(&format!(
            "ping -c 1 -w 20 {gateway}; ping -c 1 -w 20 127.0.0.1"
        ))?,
        &["1 packets received"],
    )
}

fn hostname_and_dns_are_as_the_pod_says(context: &Context<'_>) -> Result<()> {
    let pod = context.pod_with(|config| {
        config["hostname"] = json!("named");
        config["dns_config"] = json!({
            "servers": ["192.0.2.53", "192.0.2.54"], "searches": ["a.example", "b.example"], "options": ["ndots:3"],
        });
    })?;
    let out = pod.output_of("hostname; cat /etc/hostname; cat /etc/resolv.conf")?;
    same(
        "hostname and resolv.conf",
        out.as_str(),
        "named\nnamed\nsearch a.example b.example\nnameserver 192.0.2.53\nnameserver 192.0.2.54\noptions ndots:3\n",
    )
}

fn ports_are_forwarded_to_whatever_listens_on_the_pod_s_localhost(
    context: &Context<'_>,
) -> Result<()> {
    let pod = context.pod()?;
    let ports = [("127.0.0.1:8080", 8080), ("0.0.0.0:8081", 8081)];
    // The second container's server comes when its port is forwarded already.
    let _first = pod.run(&format!("exec httpd -f -p {} -h /var/www", ports[0].0))?;
    let forwards = [
        Forward::start(&context.crictl, &pod.id, ports[0].1)?,
        Forward::start(&context.crictl, &pod.id, ports[1].1)?,
    ];
    let _second = pod.run(&format!("exec httpd -f -p {} -h /var/www", ports[1].0))?;
    for ((listens, port), forward) in ports.iter().zip(&forwards) {
        // crictl of 1.36 ends with the first connection that is refused: then anew.
        until(SOON, &format!("an answer of {listens}"), || {
            let answer = match forward.get() {
                Ok(answer) if !answer.is_empty() => answer,
                _ => Forward::start(&context.crictl, &pod.id, *port)?.get()?,
            };
            Ok(answer.ends_with("dyad\n").then_some(()))
        })?;
    }
    let nobody = Forward::start(&context.crictl, &pod.id, 8082)?;
    same("answer where nobody listens", nobody.get()?.as_str(), "")
}
