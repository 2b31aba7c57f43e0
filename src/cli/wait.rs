//! `ctlfs wait`: waits until a mount shows a sequence of the ledger; and the `--wait` of the
//! commands that write.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use clap::{Args, ValueHint};
use serde_json::Value as Json;

use super::Error;
use crate::config;
use crate::daemon;
use crate::model::Seq;

/// The pauses between looks at the mount: reading its sequence takes microseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);
/// How long a daemon gets to say why it is not there yet.
const ASK: Duration = Duration::from_secs(5);

/// Wait until a mount shows a sequence of the ledger.
///
/// Every change has a sequence, which 'ctlfs put', 'delete' and 'apply' print. Once this command
/// has returned, whatever reads the mount finds that change and all before it. The exit status is 0
/// then, 1 when the time is up, and 2 when ctlfs is not mounted there, or ceases to be.
#[derive(Args)]
#[command(verbatim_doc_comment)]
#[command(
    after_help = "Examples:\n  ctlfs wait /ctl --seq 4711\n  ctlfs wait /ctl --seq 4711 --timeout 30s && systemctl reload app\n\n'ctlfs put --wait /ctl …' writes and waits in one."
)]
pub struct WaitArgs {
    /// Where ctlfs is mounted.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    mountpoint: PathBuf,
    /// The sequence to wait for.
    #[arg(long, value_name = "N")]
    seq: u64,
    /// How long to wait at most [default: for ever].
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    timeout: Option<Duration>,
}

/// Runs the command.
pub fn run(args: WaitArgs) -> Result<(), Error> {
    let path = mounted(&args.mountpoint, "wait for")?;
    until_shown(&path, Seq::new(args.seq), args.timeout)
}

/// What the commands that write take to wait for a mount.
#[derive(Args)]
pub(super) struct WaitOptions {
    /// Wait until the mount there shows what was written.
    #[arg(long, value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    wait: Option<PathBuf>,
    /// How long --wait waits at most.
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "10s",
        requires = "wait"
    )]
    #[arg(value_parser = config::duration)]
    timeout: Duration,
}

/// A mount that is to be waited for.
pub(super) struct Waiting(Option<(PathBuf, Duration)>);

impl WaitOptions {
    /// Checks, before anything is written, that there is a mount to wait for.
    pub(super) fn prepare(&self) -> Result<Waiting, Error> {
        Ok(Waiting(match &self.wait {
            None => None,
            Some(mountpoint) => Some((mounted(mountpoint, "wait for")?, self.timeout)),
        }))
    }
}

impl Waiting {
    /// Waits until the mount shows `seq`. When nothing had to be written it is not known, and
    /// `last` gives the ledger's last: what is as asked is no newer than that.
    pub(super) fn finish(
        self,
        seq: Option<Seq>,
        last: impl FnOnce() -> Result<Option<Seq>, Error>,
    ) -> Result<(), Error> {
        let Some((path, timeout)) = self.0 else {
            return Ok(());
        };
        let seq = match seq {
            Some(seq) => Some(seq),
            None => last()?,
        };
        match seq {
            Some(seq) => until_shown(&path, seq, Some(timeout)),
            None => Ok(()),
        }
    }
}

/// The mount point that `path` names. If nothing is mounted there it says so, as what could not be
/// done with it, and the exit status is 2.
pub(super) fn mounted(path: &Path, what: &str) -> Result<PathBuf, Error> {
    let path = match daemon::resolve(path) {
        Ok(path) => path,
        Err(error) => {
            return Err(not_mounted(&format!(
                "cannot {what} {}: {error}",
                path.display()
            )));
        }
    };
    let mounted = daemon::mount_at(&path).map_err(Error::failed)?;
    if !mounted.is_some_and(|mount| mount.is_ctlfs()) {
        return Err(not_mounted(&format!(
            "{}: ctlfs is not mounted there",
            path.display()
        )));
    }
    if daemon::is_stale(&path) {
        return Err(not_mounted(&format!(
            "{}: a stale mount, its daemon is dead; mount again, or remove it with 'ctlfs unmount \
             {0}'",
            path.display()
        )));
    }
    Ok(path)
}

fn not_mounted(text: &str) -> Error {
    let _ = writeln!(io::stderr(), "ctlfs: {text}");
    Error::Exit(2)
}

/// How a wait ended without the sequence.
enum Miss {
    /// The mount is gone, or its daemon.
    Gone,
    /// What it says cannot be read.
    Unreadable(io::Error),
}

fn until_shown(path: &Path, wanted: Seq, timeout: Option<Duration>) -> Result<(), Error> {
    let began = Instant::now();
    let (send, result) = mpsc::channel();
    let file = path.join(".ctlfs/seq");
    // On a thread of its own: a daemon that does not answer would hold a read up for ever.
    std::thread::Builder::new()
        .name("wait".into())
        .spawn(move || {
            let mut pause = FIRST_PAUSE;
            let end = loop {
                match shown(&file) {
                    Ok(seq) if seq >= wanted => break Ok(()),
                    Ok(_) => {}
                    Err(miss) => break Err(miss),
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            };
            // Whoever listened has given up.
            let _ = send.send(end);
        })
        .map_err(|error| Error::failed(format!("cannot wait for {}: {error}", path.display())))?;
    let end = match timeout {
        Some(timeout) => result.recv_timeout(timeout),
        None => result.recv().map_err(|_| RecvTimeoutError::Disconnected),
    };
    match end {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Miss::Gone)) => Err(not_mounted(&format!(
            "{} was unmounted, or its daemon died, before it showed sequence {wanted}",
            path.display()
        ))),
        Ok(Err(Miss::Unreadable(error))) => Err(Error::failed(format!(
            "cannot read the sequence that {} shows: {error}",
            path.display()
        ))),
        Err(RecvTimeoutError::Timeout) => Err(Error::failed(late(path, wanted, began.elapsed()))),
        Err(RecvTimeoutError::Disconnected) => Err(Error::failed(format!(
            "cannot wait for {}: the thread that reads it failed",
            path.display()
        ))),
    }
}

fn shown(file: &Path) -> Result<Seq, Miss> {
    let text = std::fs::read_to_string(file).map_err(|error| match error.raw_os_error() {
        // The directory beneath has no such file; a dead daemon gives one of the others.
        Some(libc::ENOENT | libc::ENOTCONN | libc::ECONNABORTED) => Miss::Gone,
        _ => Miss::Unreadable(error),
    })?;
    text.trim_end()
        .parse()
        .map(Seq::new)
        .map_err(|_| Miss::Unreadable(io::Error::other("it is not a number")))
}

/// Says where a mount stands that did not get there in time, and why as far as it knows.
fn late(path: &Path, wanted: Seq, waited: Duration) -> String {
    let waited = humantime::format_duration(Duration::from_millis(
        waited.as_millis().try_into().unwrap_or(u64::MAX),
    ));
    let path_shown = path.display();
    let status = daemon::read_status(path, ASK)
        .and_then(|text| serde_json::from_slice(&text).map_err(io::Error::from));
    match status {
        Ok(status) => format!(
            "{path_shown} does not show sequence {wanted} after {waited}: {}",
            why(&status, wanted)
        ),
        Err(error) => format!(
            "{path_shown} does not show sequence {wanted} after {waited}, and its status cannot \
             be read: {error}"
        ),
    }
}

fn why(status: &Json, wanted: Seq) -> String {
    let number = |name: &str| status.get(name).and_then(Json::as_u64);
    let stands = match number("seq") {
        Some(seq) => format!("it stands at {seq}"),
        None => "where it stands is not known".into(),
    };
    if let Some(reason) = status.pointer("/problem/reason").and_then(Json::as_str) {
        return format!("{stands}; {reason}");
    }
    match (number("origin_seq"), number("seconds_since_contact")) {
        (Some(last), Some(ago)) if last < wanted.get() => format!(
            "{stands}, and the last sequence that its origin was seen to have, {ago} s ago, is \
             {last}; is it the ledger that was written to?"
        ),
        (Some(last), _) => format!(
            "{stands} and is applying what its origin has, up to {last}; 'ctlfs status' shows how \
             it goes on"
        ),
        (None, _) => format!("{stands}, and its origin has not answered yet"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn it_says_why_it_takes_so_long() {
        let of = |status| why(&status, Seq::new(9));
        assert_eq!(
            of(json!({"seq": 5, "origin_seq": 9, "problem": {"reason": "no table"}})),
            "it stands at 5; no table"
        );
        let other = of(json!({"seq": 5, "origin_seq": 5, "seconds_since_contact": 1}));
        assert!(other.contains("1 s ago, is 5"), "{other}");
        let behind = of(json!({"seq": 5, "origin_seq": 12, "seconds_since_contact": 1}));
        assert!(behind.contains("up to 12"), "{behind}");
        assert!(of(json!({"seq": 0})).contains("not answered yet"));
    }
}
