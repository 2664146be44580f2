//! Giving up system calls that a running server has no use for.
//!
//! A decoder bug that a hostile picture finds should end in a process that can do nothing: start no program, write
//! or open no file, make no connection. The filter names what is allowed; anything else fails with EPERM, which
//! ends one request and not the server. It holds for all threads, those to come included.
//!
//! Surprising: `clone3` hides its flags in memory, where a filter cannot look, so it is said not to exist; the C
//! library then uses `clone`, of which only threads are allowed.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use crate::options::Sandbox;

/// Enters it. Where connections can be made, files can be read, which resolving a name needs.
pub(crate) fn enter(sandbox: Sandbox, outbound: Outbound) -> Result<(), String> {
    if sandbox == Sandbox::Off {
        return Ok(());
    }
    for filter in filters(outbound).map_err(|error| error.to_string())? {
        apply_filter_all_threads(&filter).map_err(|error| error.to_string())?;
    }
    tracing::info!(?outbound, "sandboxed");
    Ok(())
}

/// Whether connections can be made: pictures fetched, traces exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outbound {
    Denied,
    Allowed,
}

/// In the order they are to be applied.
fn filters(outbound: Outbound) -> Result<[BpfProgram; 2], BackendError> {
    let target = TargetArch::try_from(std::env::consts::ARCH)?;
    let errno = |number: i32| SeccompAction::Errno(number as u32);

    let hidden = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let hides = SeccompFilter::new(hidden, SeccompAction::Allow, errno(libc::ENOSYS), target)?;

    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_X86).map(|&call| (call, Vec::new())).collect();
    // The first filter answers for it; here it must not be an error of another kind.
    rules.insert(libc::SYS_clone3, Vec::new());
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![only_if(0, thread, thread)?]);
    // Memory that is written and then run is for those who bring code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![only_if(2, libc::PROT_EXEC as u64, 0)?]);
    }
    if outbound == Outbound::Allowed {
        rules.extend(ALLOWED_OUTBOUND.iter().map(|&call| (call, Vec::new())));
        let writing = libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND;
        rules.insert(libc::SYS_openat, vec![only_if(2, writing as u64, 0)?]);
    }
    let allows = SeccompFilter::new(rules, errno(libc::EPERM), SeccompAction::Allow, target)?;
    Ok([hides.try_into()?, allows.try_into()?])
}

/// True where the bits of `mask` in an argument are those of `value`.
fn only_if(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
}

/// What connections, threads, memory, clocks and logs need.
const ALLOWED: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Older calls that one architecture still has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_X86: &[c_long] = &[libc::SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_X86: &[c_long] = &[];

/// What resolving a name and a connection need.
const ALLOWED_OUTBOUND: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_ioctl,
    libc::SYS_newfstatat,
    libc::SYS_ppoll,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_socket,
    libc::SYS_statx,
    libc::SYS_uname,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

#[cfg(test)]
mod tests {
    use std::{fs, io, net::TcpStream, process::Command};

    use super::*;

    /// Runs `work` in a thread of its own that has entered the sandbox.
    fn inside<T: Send + 'static>(outbound: Outbound, work: impl FnOnce() -> T + Send + 'static) -> T {
        let sandboxed = move || {
            for filter in filters(outbound).unwrap() {
                seccompiler::apply_filter(&filter).unwrap();
            }
            work()
        };
        std::thread::spawn(sandboxed).join().unwrap()
    }

    fn is_denied<T>(result: &io::Result<T>) -> bool {
        matches!(result, Err(error) if error.raw_os_error() == Some(libc::EPERM))
    }

    #[test]
    fn files_programs_and_connections_are_out_of_reach() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let denied = inside(Outbound::Denied, move || {
            [
                is_denied(&fs::read("/proc/self/status")),
                is_denied(&fs::write(&path, "x")),
                is_denied(&TcpStream::connect("127.0.0.1:9")),
                Command::new("/bin/true").status().is_err(),
            ]
        });
        assert_eq!(denied, [true; 4], "read, write, connect, start");
    }

    #[test]
    fn memory_and_threads_are_still_there() {
        let sum = inside(Outbound::Denied, || {
            let threads: Vec<_> =
                (0..3).map(|n| std::thread::spawn(move || vec![1_u8; 8 << 20][n] as usize)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>()
        });
        assert_eq!(sum, 3);
    }

    #[test]
    fn with_connections_files_are_read_but_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (reads, writes, connects) = inside(Outbound::Allowed, move || {
            (
                fs::read("/etc/hosts").is_ok(),
                !is_denied(&fs::write(&path, "x")),
                TcpStream::connect(address).is_ok(),
            )
        });
        assert_eq!((reads, writes, connects), (true, false, true));
    }
}
