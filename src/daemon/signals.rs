//! Signals as a value that one thread waits for.
//!
//! They are blocked before any thread exists, so that no thread is ever interrupted by one.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

/// The signals that end a daemon, blocked in this thread and all that it starts.
#[derive(Clone, Copy)]
pub(crate) struct Blocked {
    set: libc::sigset_t,
    /// What was blocked before.
    pub(crate) before: Mask,
}

/// Which signals are blocked.
#[derive(Clone, Copy)]
pub(crate) struct Mask(libc::sigset_t);

impl Mask {
    pub(crate) fn new(set: libc::sigset_t) -> Self {
        Mask(set)
    }

    /// Lets `command` start with this mask: a program inherits that of the process that starts it,
    /// and would not end on a signal which is blocked there.
    pub(crate) fn apply_to(self, command: &mut Command) {
        // SAFETY: the closure makes one system call that is safe between fork and exec; the mask is
        // a copy of its own.
        unsafe {
            command.pre_exec(move || {
                let error =
                    libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut());
                match error {
                    0 => Ok(()),
                    error => Err(io::Error::from_raw_os_error(error)),
                }
            });
        }
    }
}

/// Blocks SIGINT, SIGTERM and SIGHUP; the latter only if it is not ignored, as it is under nohup: a
/// blocked signal is delivered even then. Call it before the first thread is started.
pub(crate) fn block() -> io::Result<Blocked> {
    let hangup = !is_ignored(libc::SIGHUP)?;
    let (mut set, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: sigemptyset initialises the set it is given; sigaddset and pthread_sigmask then get
    // an initialised one, and the latter initialises the old mask.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGINT, libc::SIGTERM] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        if hangup {
            libc::sigaddset(set.as_mut_ptr(), libc::SIGHUP);
        }
        let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        Ok(Blocked {
            set: set.assume_init(),
            before: Mask(before.assume_init()),
        })
    }
}

fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action this only writes the old one, which is then initialised.
    unsafe {
        if libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(action.assume_init().sa_sigaction == libc::SIG_IGN)
    }
}

impl Blocked {
    /// Waits for the next of them.
    pub(crate) fn wait(&self) -> io::Result<i32> {
        let mut signal = 0;
        // SAFETY: the set is initialised and `signal` is writable.
        let error = unsafe { libc::sigwait(&raw const self.set, &raw mut signal) };
        if error == 0 {
            Ok(signal)
        } else {
            Err(io::Error::from_raw_os_error(error))
        }
    }
}

/// Ends the process without running anything else.
pub(crate) fn exit_now(signal: i32) -> ! {
    // SAFETY: _exit has no preconditions and does not return.
    unsafe { libc::_exit(128 + signal) }
}

/// Whether writing to a closed pipe kills the process, as a short-lived command wants it, or is an
/// error, as a daemon does.
pub(crate) fn broken_pipe_kills(kills: bool) {
    let action = if kills { libc::SIG_DFL } else { libc::SIG_IGN };
    // SAFETY: both are dispositions without a handler; no code of ours runs in signal context.
    unsafe {
        libc::signal(libc::SIGPIPE, action);
    }
}

/// Has the ends of children told, which some parents leave ignored: then there would be nothing to
/// wait for.
pub(crate) fn children_are_told() {
    // SAFETY: as above.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
}

pub(crate) fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGTERM => "SIGTERM",
        libc::SIGHUP => "SIGHUP",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGABRT => "SIGABRT",
        _ => "a signal",
    }
}
