//! `ctlfs with-snapshot`: runs a command on a tree that stands still.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueHint};

use super::Error;
use crate::daemon::{self, MountpointError};

/// What a shell exits with for a command that cannot be run, and for one that is not there.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// Where a signal comes from that the kernel sends by itself, as for a terminal.
const SI_KERNEL: i32 = 0x80;

/// Run a command on a snapshot of the tree.
///
/// Pins the tree as it is now, runs the command with CTLFS_ROOT set to the pinned tree's path, and
/// drops the pin when the command ends. Everything below CTLFS_ROOT, listings included, is as of
/// one ledger sequence all the while, whatever is committed meanwhile. A pin costs no copy.
///
/// Signals are passed on to the command. Its exit status becomes this one's: 128 and the signal if
/// one killed it, 127 if it was not found, 126 if it could not be run.
#[derive(Args)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub struct WithSnapshotArgs {
    /// Where ctlfs is mounted.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    mountpoint: PathBuf,
    /// The command and its arguments.
    #[arg(value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

const EXAMPLES: &str = "\
Examples:
  ctlfs with-snapshot /ctl -- sh -c 'render-config \"$CTLFS_ROOT/app\" >proxy.conf'
  ctlfs with-snapshot /ctl -- sh -c 'cp -r \"$CTLFS_ROOT\" backup'

The pin is dropped early, and what is below CTLFS_ROOT fails with \"Stale file handle\" from then
on, when it grows older or holds back more than the mount's --pin-max-age and --pin-max-space
allow.";

/// Runs the command.
pub fn run(args: WithSnapshotArgs) -> Result<(), Error> {
    let failed = |reason| {
        Error::failed(MountpointError::System {
            what: "look for a mount on",
            path: args.mountpoint.clone(),
            reason,
        })
    };
    let mountpoint = daemon::resolve(&args.mountpoint).map_err(failed)?;
    daemon::mount_at(&mountpoint)
        .map_err(failed)?
        .filter(daemon::Mount::is_ctlfs)
        .ok_or_else(|| {
            Error::failed(format!(
                "cannot pin the tree on {}: it is not a ctlfs mount; name the directory that it is \
                 mounted on",
                mountpoint.display()
            ))
        })?;
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(Error::usage("give a command to run"));
    };
    // From here on a signal does not end this process: the pin has to be dropped.
    let signals = Signals::block()
        .map_err(|error| Error::failed(format!("cannot block signals: {error}")))?;
    let pin = Pin::make(&mountpoint)?;
    let status = spawn(program, arguments, &pin.path, &signals)
        .and_then(|child| signals.follow(child).map_err(Into::into));
    pin.report();
    drop(pin);
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            let code = match (status.code(), status.signal()) {
                (Some(code), _) => code,
                (None, signal) => 128 + signal.unwrap_or(0),
            };
            Err(Error::Exit(u8::try_from(code).unwrap_or(1)))
        }
        Err(Failure::Spawn(error)) => {
            let program = program.to_string_lossy();
            let _ = writeln!(io::stderr(), "ctlfs: cannot run {program}: {error}");
            Err(Error::Exit(match error.kind() {
                io::ErrorKind::NotFound => NOT_FOUND,
                _ => NOT_EXECUTABLE,
            }))
        }
        Err(Failure::Wait(error)) => Err(Error::failed(format!(
            "cannot wait for the command: {error}"
        ))),
    }
}

enum Failure {
    Spawn(io::Error),
    Wait(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Wait(error)
    }
}

fn spawn(
    program: &OsStr,
    arguments: &[OsString],
    root: &Path,
    signals: &Signals,
) -> Result<Child, Failure> {
    let mut command = Command::new(program);
    command.args(arguments).env("CTLFS_ROOT", root);
    signals.before.apply_to(&mut command);
    command.spawn().map_err(Failure::Spawn)
}

/// A pin that is dropped with this.
struct Pin {
    path: PathBuf,
}

impl Pin {
    fn make(mountpoint: &Path) -> Result<Self, Error> {
        let pins = mountpoint.join(".ctlfs/at");
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH);
        let nanos = nanos.unwrap_or_default().as_nanos();
        let path = pins.join(format!("with-snapshot-{}-{nanos}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => Ok(Pin { path }),
            Err(error) => {
                let what_to_do = match error.raw_os_error() {
                    Some(libc::EROFS) => "; it is mounted with '-o ro', which allows no pins",
                    Some(libc::ENOSPC) => {
                        "; there are as many pins as there may be: remove some with rmdir"
                    }
                    Some(libc::EACCES | libc::EPERM) => {
                        "; the access rule for .ctlfs says who may pin"
                    }
                    Some(libc::EOPNOTSUPP) => {
                        "; the LDB is not in WAL mode, and so cannot be pinned"
                    }
                    _ => "",
                };
                let mountpoint = mountpoint.display();
                Err(Error::failed(format!(
                    "cannot pin the tree on {mountpoint}: {error}{what_to_do}"
                )))
            }
        }
    }

    /// Says so when the pin did not last as long as the command.
    fn report(&self) {
        let listed = fs::read_dir(&self.path);
        if listed.is_err_and(|error| error.raw_os_error() == Some(libc::ESTALE)) {
            let _ = writeln!(
                io::stderr(),
                "ctlfs: the pin was dropped while the command ran, for --pin-max-age or \
                 --pin-max-space of the mount: what it read after that failed"
            );
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        match fs::remove_dir(&self.path) {
            Ok(()) => {}
            // Somebody else has removed it, or the mount is gone.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENOTCONN | libc::ENOTDIR)
                ) => {}
            Err(error) => {
                let path = self.path.display();
                let _ = writeln!(io::stderr(), "ctlfs: cannot drop the pin {path}: {error}");
            }
        }
    }
}

/// The signals that are passed on, and SIGCHLD, blocked: they are waited for.
struct Signals {
    set: libc::sigset_t,
    before: daemon::Mask,
}

impl Signals {
    fn block() -> io::Result<Self> {
        let (mut set, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: sigemptyset initialises the set it is given, pthread_sigmask the old mask; the
        // other calls get what is initialised.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [
                libc::SIGCHLD,
                libc::SIGHUP,
                libc::SIGINT,
                libc::SIGQUIT,
                libc::SIGTERM,
                libc::SIGUSR1,
                libc::SIGUSR2,
            ] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            Ok(Signals {
                set: set.assume_init(),
                before: daemon::Mask::new(before.assume_init()),
            })
        }
    }

    /// Waits for the end of `child` and passes on to it what arrives meanwhile.
    fn follow(&self, mut child: Child) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
            // SAFETY: the set is initialised and the information writable; it is written when the
            // call succeeds.
            let (signal, code) = unsafe {
                let signal = libc::sigwaitinfo(&raw const self.set, info.as_mut_ptr());
                if signal < 0 {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
                (signal, info.assume_init().si_code)
            };
            // What the terminal sends (Ctrl-C), it sends to the command as well.
            if signal == libc::SIGCHLD || code == SI_KERNEL {
                continue;
            }
            if let Ok(pid) = i32::try_from(child.id()) {
                // SAFETY: kill takes no pointers. The child was not waited for successfully, so
                // the number is still its own.
                unsafe {
                    libc::kill(pid, signal);
                }
            }
        }
    }
}
