//! The CRI conformance suite. What is skipped fails with containerd's own shim too,
//! here: it needs images of public registries, or what Debian's busybox has not.
//! Everything else must pass (`DYAD_E2E_HANDLERS=runc` shows that it does there).

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use dyad_e2e::command;
use dyad_e2e::env::repository;

use super::{CONTAINERS, Case, case};
use crate::context::{BUSYBOX, Context, Handler};

pub const CASES: &[Case] =
    &[case!(the_conformance_suite_passes_as_with_the_stock_shim).on(CONTAINERS)];

const SKIPPED: [&str; 16] = [
    // Images that only public registries have.
    "Image Manager",
    "Image Identifier",
    "Image Consistency",
    "Multiple Containers",
    "SupplementalGroupsPolicy",
    "NoNewPrivs",
    // A web server in the image.
    "portforward",
    "port mapping",
    "HostPID",
    "PodPID",
    "ContainerPID",
    // pgrep, ipcs, and a shell that is not masked.
    "execSync with timeout",
    "HostIpc",
    "MaskedPaths",
    "AppArmor",
    // containerd 2.3 wants runc's own options of a handler that maps owners, and refuses
    // those of any other (client/task.go, getRuncOptions: "failed to get runtime v2 options"):
    // see USER_NAMESPACES.
    "Host idmap mount support is needed.*NamespaceMode_POD",
];

/// What a handler with runc's type and options has to pass beside.
const USER_NAMESPACES: &str = "UserNamespaces";
/// That handler, with Dyad as its shim (hack/lib/containerd.sh).
const WITH_RUNCS_OPTIONS: &str = "dyad-runc";

fn the_conformance_suite_passes_as_with_the_stock_shim(context: &Context<'_>) -> Result<()> {
    let mut find = Command::new("bash");
    find.args(["-c", ". hack/lib.sh && critest"])
        .current_dir(repository());
    let critest =
        command::run(&mut find, b"", Duration::from_secs(600))?.success("build critest")?;
    for image in ["busybox:1.29-2", "nginx:1.14-2"] {
        let name = format!("registry.k8s.io/e2e-test-images/{image}");
        context
            .env
            .ctr(&["images", "tag", "--force", BUSYBOX, &name])?;
    }
    let endpoint = format!(
        "unix://{}/containerd/containerd.sock",
        context.env.dir.display()
    );
    let run = |handler: &str, which: [&str; 2]| {
        let mut suite = Command::new(critest.text().trim());
        suite
            .args(["--runtime-endpoint", &endpoint])
            .args(["--image-endpoint", &endpoint])
            .args(["--runtime-handler", handler])
            .args(which)
            .args(["--ginkgo.no-color", "--ginkgo.succinct"]);
        let done = command::run(&mut suite, b"", Duration::from_secs(280))?;
        if !done.status.success() {
            let out = done.text();
            let failures: Vec<&str> = out.lines().filter(|line| line.contains("[FAIL")).collect();
            bail!(
                "critest of {handler} failed:\n{}\n{out}",
                failures.join("\n")
            );
        }
        Ok(())
    };
    run(
        context.handler.name(),
        ["--ginkgo.skip", &SKIPPED.join("|")],
    )?;
    match context.handler {
        Handler::Dyad => run(WITH_RUNCS_OPTIONS, ["--ginkgo.focus", USER_NAMESPACES]),
        _ => Ok(()),
    }
}
