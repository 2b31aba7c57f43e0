//! Going to the background: a fork before any thread exists, and a pipe by which the daemon tells
//! the command that started it how the start goes.
//!
//! The pipe carries lines of a letter and a sentence: `p` progress, `w` a warning, `r` ready, `e` a
//! failure. Its end without `r` or `e` means that the daemon died.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use super::signals;

/// What a start says to whoever waits for it.
#[derive(Debug)]
pub(crate) enum Reporter {
    /// On this process's standard error.
    Here,
    /// Through the pipe to the command that started the daemon.
    Pipe(File),
    /// To nobody any more: the start is over.
    Done,
}

impl Reporter {
    /// A line about how far the start is.
    pub(crate) fn progress(&mut self, text: &str) {
        self.say('p', text);
    }

    /// Something to know that does not stop the start.
    pub(crate) fn warn(&mut self, text: &str) {
        tracing::warn!("{text}");
        self.say('w', text);
    }

    /// The start went well; nothing is said after this.
    pub(crate) fn ready(&mut self) {
        self.say('r', "");
        *self = Reporter::Done;
    }

    /// The start failed; nothing is said after this.
    pub(crate) fn failed(&mut self, text: &str) {
        self.say('e', text);
        *self = Reporter::Done;
    }

    fn say(&mut self, kind: char, text: &str) {
        // Whoever listened may be gone, which is no reason to stop.
        let _ = match self {
            Reporter::Pipe(pipe) => writeln!(pipe, "{kind}{}", text.replace('\n', " ")),
            // A warning is in the log, which here is standard error too.
            Reporter::Here if kind == 'p' => writeln!(io::stderr(), "ctlfs: {text}"),
            Reporter::Here | Reporter::Done => Ok(()),
        };
    }
}

/// The two sides of a fork.
pub(crate) enum Fork {
    /// The command that was called.
    Caller(Daemon),
    /// The daemon, in a session of its own.
    Daemon(Reporter),
}

/// The daemon as its caller sees it.
pub(crate) struct Daemon {
    pid: libc::pid_t,
    pipe: File,
}

/// How a start in the background ended.
pub(crate) enum Outcome {
    /// It is running.
    Ready,
    /// It said why not.
    Failed(String),
    /// It ended without a word.
    Died(String),
}

/// Forks. The daemon's side has no terminal, `/` as its directory, a private umask and `/dev/null`
/// as its standard streams. Call it before the first thread is started.
pub(crate) fn fork() -> io::Result<Fork> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills the array it is given.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors are new, open and owned by nothing else.
    let (read, write) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    // SAFETY: there is only this thread, so the child's memory is consistent.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(read);
            close_others(&write);
            let mut reporter = Reporter::Pipe(write);
            if let Err(error) = leave_terminal() {
                // The caller says it; this side must not say it as well.
                reporter.failed(&format!(
                    "cannot go to the background: {error}; try --foreground"
                ));
                std::process::exit(1);
            }
            Ok(Fork::Daemon(reporter))
        }
        pid => Ok(Fork::Caller(Daemon { pid, pipe: read })),
    }
}

/// Closes what the caller left open: its locks and pipes would be held as long as the daemon lives.
fn close_others(kept: &File) {
    let kept = kept.as_raw_fd().cast_unsigned();
    // SAFETY: close_range takes no pointers; beside the standard streams and `kept` this side has
    // nothing open. Where the kernel lacks it they stay open.
    unsafe {
        libc::close_range(3, kept.saturating_sub(1), 0);
        libc::close_range(kept.saturating_add(1), libc::c_uint::MAX, 0);
    }
}

fn leave_terminal() -> io::Result<()> {
    // SAFETY: none of these takes a pointer; a child just forked leads no process group, so setsid
    // cannot fail.
    unsafe {
        libc::setsid();
        libc::umask(0o077);
    }
    std::env::set_current_dir("/")?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("/dev/null cannot be opened ({error})"),
            )
        })?;
    for stream in 0..3 {
        redirect(&null, stream)?;
    }
    Ok(())
}

/// Makes the standard stream `stream` another name for `file`.
pub(crate) fn redirect(file: &File, stream: i32) -> io::Result<()> {
    // SAFETY: dup2 takes no pointers; the standard streams are owned by nobody in particular.
    if unsafe { libc::dup2(file.as_raw_fd(), stream) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The daemon that an interrupted caller takes down with it.
static STARTING: AtomicI32 = AtomicI32::new(0);

extern "C" fn take_down(signal: libc::c_int) {
    let pid = STARTING.load(Ordering::Relaxed);
    // SAFETY: kill and _exit are async-signal-safe; `pid` is our own child, not yet waited for.
    unsafe {
        if pid > 0 {
            libc::kill(pid, libc::SIGTERM);
        }
        libc::_exit(128 + signal);
    }
}

impl Daemon {
    /// Passes on what the daemon says (`line` gets whole sentences) until it is ready or gone. An
    /// interrupt in that time stops the daemon too.
    pub(crate) fn wait(self, mut line: impl FnMut(&str)) -> Outcome {
        STARTING.store(self.pid, Ordering::Relaxed);
        for signal in [libc::SIGINT, libc::SIGTERM] {
            // SAFETY: the handler makes only async-signal-safe calls.
            unsafe {
                libc::signal(signal, take_down as *const () as libc::sighandler_t);
            }
        }
        for text in BufReader::new(&self.pipe).lines().map_while(Result::ok) {
            let mut chars = text.chars();
            match chars.next() {
                Some('r') => return Outcome::Ready,
                Some('e') => return Outcome::Failed(chars.as_str().to_owned()),
                Some('p' | 'w') => line(chars.as_str()),
                _ => {}
            }
        }
        Outcome::Died(self.fate())
    }

    fn fate(&self) -> String {
        let mut status = 0;
        // SAFETY: `status` is writable, and the process is our child.
        if unsafe { libc::waitpid(self.pid, ptr::from_mut(&mut status), 0) } != self.pid {
            return "for a reason unknown".into();
        }
        if libc::WIFSIGNALED(status) {
            let signal = libc::WTERMSIG(status);
            format!("killed by {} ({signal})", signals::name(signal))
        } else {
            format!("with exit status {}", libc::WEXITSTATUS(status))
        }
    }
}
