//! `ctlfs unmount`: takes a ctlfs mount away and waits until its daemon is gone.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueHint};

use super::Error;
use crate::daemon::{self, MountpointError, Process};

const DEADLINE: Duration = Duration::from_secs(10);
/// How long a daemon gets to notice by itself that nobody uses its mount any more.
const PATIENCE: Duration = Duration::from_secs(2);

/// Unmount a ctlfs mount.
///
/// Waits until the daemon has ended, so that nothing is left. Also removes what a killed daemon
/// left mounted. Programs that hold files of the tree open do not prevent it: the tree goes away
/// for everybody else at once, and they may get errors from then on. Refuses anything that is not a
/// ctlfs mount.
#[derive(Args)]
#[command(verbatim_doc_comment, visible_alias = "umount")]
#[command(after_help = "Example:\n  ctlfs unmount /ctl")]
pub struct UnmountArgs {
    /// Where ctlfs is mounted.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    mountpoint: PathBuf,
}

/// Runs the command.
pub fn run(args: UnmountArgs) -> Result<(), Error> {
    let failed = |reason| MountpointError::System {
        what: "unmount",
        path: args.mountpoint.clone(),
        reason,
    };
    let path = daemon::resolve(&args.mountpoint)
        .map_err(failed)
        .map_err(Error::failed)?;
    let mount = daemon::mount_at(&path)
        .map_err(failed)
        .map_err(Error::failed)?
        .filter(daemon::Mount::is_ctlfs)
        .ok_or_else(|| Error::failed(MountpointError::NotOurs(path.clone())))?;

    let daemon = if daemon::is_stale(&path) {
        None
    } else {
        daemon::daemon_identity(&path).and_then(|daemon| daemon.find(mount.user?))
    };

    let mut busy = false;
    match daemon::detach(&path, false) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            busy = true;
            let _ = writeln!(
                io::stderr(),
                "ctlfs: {} is in use; unmounting it all the same",
                path.display()
            );
            detach_lazily(&path).map_err(Error::failed)?;
        }
        // Somebody else was faster.
        Err(_) if !daemon::is_mounted(mount.id) => {}
        Err(error) => detach_after(error, &path).map_err(Error::failed)?,
    }
    match daemon {
        Some(daemon) => wait_for(&daemon, busy, &path),
        None => Ok(()),
    }
}

/// A daemon ends by itself once nobody uses its mount. Open files and other mount namespaces can
/// put that off, so it is told in the end.
fn wait_for(daemon: &Process, busy: bool, path: &Path) -> Result<(), Error> {
    let patience = if busy { Duration::ZERO } else { PATIENCE };
    if daemon::wait_until(patience, || !daemon.lives()) {
        return Ok(());
    }
    daemon.terminate();
    if daemon::wait_until(DEADLINE, || !daemon.lives()) {
        return Ok(());
    }
    Err(Error::failed(format!(
        "{} is unmounted, but its daemon (pid {pid}) has not ended within {} s; end it with \
         'kill -9 {pid}'",
        path.display(),
        DEADLINE.as_secs(),
        pid = daemon.pid,
    )))
}

fn detach_lazily(path: &Path) -> Result<(), MountpointError> {
    daemon::detach(path, true).map_err(|reason| MountpointError::System {
        what: "unmount",
        path: path.to_owned(),
        reason,
    })
}

/// A dead mount can refuse an ordinary unmount with other errors than "busy".
fn detach_after(error: io::Error, path: &Path) -> Result<(), MountpointError> {
    if daemon::is_stale(path) {
        detach_lazily(path)
    } else {
        Err(MountpointError::System {
            what: "unmount",
            path: path.to_owned(),
            reason: error,
        })
    }
}
