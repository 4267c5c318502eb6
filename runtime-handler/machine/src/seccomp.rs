//! Compiles a spec's seccomp profile to BPF, on the host: in the guest it would cost the
//! container's start 30-60 ms under TCG, here 8.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use dyad_runtime_handler::Error;
use dyad_runtime_handler::error::{Context, Result};
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

/// `errno` that a rule without one answers with.
const DEFAULT_ERRNO: u32 = libc::EPERM as u32;

/// A compiled profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// `struct sock_filter[]`.
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*` to load it with.
    pub flags: u32,
}

/// Compiles the profile.
///
/// # Errors
/// `InvalidArgument` for what only a host process can serve (a notify listener), or an
/// action or operator that libseccomp does not know.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    if profile.listener_path().is_some() {
        return Err(Error::InvalidArgument(
            "linux.seccomp.listenerPath: a machine's guest cannot ask a listener on the host; use a profile without SCMP_ACT_NOTIFY".into(),
        ));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let failed = || "compile the seccomp profile".to_owned();
    let mut filter = ScmpFilterContext::new(default).context(failed)?;
    // The loader sets it where the spec asks; the program does not depend on it.
    filter.set_ctl_nnp(false).context(failed)?;
    for arch in profile.architectures().iter().flatten() {
        // Only what an x86-64 guest kernel runs.
        let arch = match arch {
            Arch::ScmpArchX86 => ScmpArch::X86,
            Arch::ScmpArchX32 => ScmpArch::X32,
            Arch::ScmpArchX86_64 => ScmpArch::X8664,
            _ => continue,
        };
        filter.add_arch(arch).context(failed)?;
    }
    for rule in profile.syscalls().iter().flatten() {
        add_rule(&mut filter, rule, default)?;
    }
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG as u32,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32
            }
            // One thread loads it, just before execve; there is none to synchronise.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(Error::InvalidArgument(
                    "linux.seccomp.flags: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs a listener, which a machine's guest cannot have".into(),
                ));
            }
        };
    }
    let program = export(&filter).context(failed)?;
    Ok(Filter { program, flags })
}

/// libseccomp before 2.6 exports to a file only.
fn export(filter: &ScmpFilterContext) -> io::Result<Vec<u8>> {
    let mut file = File::from(memfd_create("seccomp", MFdFlags::MFD_CLOEXEC)?);
    filter.export_bpf(&file).map_err(io::Error::other)?;
    let mut program = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut program)?;
    Ok(program)
}

fn add_rule(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<()> {
    let wanted = action(rule.action(), rule.errno_ret())?;
    // libseccomp refuses rules that repeat the default.
    if wanted == default {
        return Ok(());
    }
    let comparisons = rule
        .args()
        .iter()
        .flatten()
        .map(comparison)
        .collect::<Result<Vec<_>>>()?;
    for name in rule.names() {
        // A profile names calls that this libseccomp may not know: OCI runtimes leave them out.
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            continue;
        };
        let context = || format!("compile the seccomp rule for {name}");
        // Several conditions on one argument mean "any of them": a rule each (as runc does).
        let repeated = rule.args().iter().flatten().enumerate().any(|(i, a)| {
            let all = rule.args().as_ref().map_or(&[][..], Vec::as_slice);
            all[..i].iter().any(|b| b.index() == a.index())
        });
        if repeated {
            for one in &comparisons {
                filter
                    .add_rule_conditional(wanted, syscall, &[*one])
                    .context(context)?;
            }
        } else if comparisons.is_empty() {
            filter.add_rule(wanted, syscall).context(context)?;
        } else {
            filter
                .add_rule_conditional(wanted, syscall, &comparisons)
                .context(context)?;
        }
    }
    Ok(())
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = errno.unwrap_or(DEFAULT_ERRNO);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => {
            let value = u16::try_from(errno).map_err(|_| {
                Error::InvalidArgument(format!(
                    "linux.seccomp: errnoRet {errno} of SCMP_ACT_TRACE is over 65535"
                ))
            })?;
            ScmpAction::Trace(value)
        }
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Error::InvalidArgument(
                "linux.seccomp: SCMP_ACT_NOTIFY needs a listener on the host, which a machine's guest cannot ask".into(),
            ));
        }
    })
}

fn comparison(arg: &LinuxSeccompArg) -> Result<ScmpArgCompare> {
    let index = u32::try_from(arg.index())
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| {
            Error::InvalidArgument(format!(
                "linux.seccomp: argument index {} is over 5",
                arg.index()
            ))
        })?;
    let (op, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(arg.value()),
            arg.value_two().unwrap_or(0),
        ),
    };
    Ok(ScmpArgCompare::new(index, op, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).expect("profile")
    }

    #[test]
    fn a_profile_becomes_a_program_of_whole_instructions() {
        let filter = compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [
                  {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                  {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                   "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
                  {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                   "args": [{"index": 0, "value": 2114060288, "op": "SCMP_CMP_MASKED_EQ"}]},
                  {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
                   "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                            {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}
                ]}"#,
        ))
        .expect("compiled");
        assert!(!filter.program.is_empty());
        assert_eq!(
            filter.program.len() % 8,
            0,
            "struct sock_filter has 8 bytes"
        );
        assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_LOG as u32);
    }

    #[test]
    fn what_needs_a_listener_on_the_host_is_refused_by_name() {
        let notify = profile(
            r#"{"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}"#,
        );
        let error = compile(&notify).expect_err("refused");
        assert!(error.to_string().contains("SCMP_ACT_NOTIFY"));
        let listener =
            profile(r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock"}"#);
        let error = compile(&listener).expect_err("refused");
        assert!(error.to_string().contains("listenerPath"));
    }

    #[test]
    fn an_argument_that_no_call_has_is_refused() {
        let odd = profile(
            r#"{"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO",
                  "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
        );
        assert!(compile(&odd).is_err());
    }
}
