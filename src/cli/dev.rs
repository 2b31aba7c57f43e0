//! `ctlfs dev`: the whole of ctlfs on one machine, in one process in the foreground.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};

use super::Error;
use super::mount::Common;
use crate::config::{self, Follow};
use crate::daemon::{self, Reporter};
use crate::ledger::OriginUrl;

/// What `--sample` loads, in the form that `apply` reads.
const SAMPLE: &str = include_str!("sample.yaml");

/// Try ctlfs on this machine.
///
/// Runs everything in one process: an embedded ledger (an SQLite file), the reflector, and the
/// mount. Creates what is missing, stays in the foreground, and unmounts on Ctrl-C. The ledger stays
/// in the state directory as ledger.db: the next 'ctlfs dev' shows the same tree, and every other
/// command works with it as --origin sqlite:///…/ledger.db.
#[derive(Args)]
#[command(verbatim_doc_comment)]
#[command(
    after_help = "Examples:\n  ctlfs dev --sample ./ctl\n  ctlfs dev --state /tmp/state ./ctl"
)]
pub struct DevArgs {
    /// Load sample data if the ledger is empty: flags, limits, routes, a certificate.
    #[arg(long)]
    sample: bool,
    #[command(flatten)]
    common: Common,
    /// Where to mount; created if it is missing, and removed again at the end.
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::DirPath)]
    mountpoint: PathBuf,
}

/// Runs the command.
pub fn run(mut args: DevArgs) -> Result<(), Error> {
    daemon::broken_pipe_kills(false);
    let state = match args.common.state.take() {
        Some(path) => path,
        None => beside(&args.mountpoint)?,
    };
    let state = config::absolute(&state).map_err(Error::usage)?;
    args.common.state = Some(state.clone());
    let ledger = state.join("ledger.db");
    let url = OriginUrl::sqlite(&ledger).map_err(Error::failed)?;
    let follow = Follow::Origin {
        url: url.clone(),
        poll_interval: args.common.poll_interval,
    };
    // Signals wait from here on, so that a directory of ours never stays behind.
    daemon::block_signals().map_err(Error::failed)?;
    let directory = Directory::create(&args.mountpoint)?;
    let shown = args.mountpoint.clone();
    let config = args.common.validated(args.mountpoint, follow, None, true)?;
    prepare(&state, &url, args.sample)?;
    let sampled = args.sample;
    let result = daemon::run(&config, &mut Reporter::Here, || {
        let _ = io::stdout().write_all(greeting(&shown, &ledger, sampled).as_bytes());
    });
    drop(directory);
    Ok(result?)
}

/// `./ctl.state` for `./ctl`.
fn beside(mountpoint: &Path) -> Result<PathBuf, Error> {
    let name = mountpoint.file_name().ok_or_else(|| {
        Error::usage(format!(
            "no place for the state beside {}; give one with --state DIR",
            mountpoint.display()
        ))
    })?;
    let mut name = name.to_owned();
    name.push(".state");
    Ok(mountpoint.with_file_name(name))
}

/// Makes the state directory and the ledger in it.
fn prepare(state: &Path, url: &OriginUrl, sample: bool) -> Result<(), Error> {
    daemon::prepare_state(state).map_err(Error::failed)?;
    daemon::prepare_embedded(url, sample.then_some(SAMPLE)).map_err(Error::failed)
}

/// A mount point that goes away again if it was created here.
struct Directory(Option<PathBuf>);

impl Directory {
    fn create(path: &Path) -> Result<Self, Error> {
        match fs::create_dir(path) {
            Ok(()) => Ok(Directory(Some(
                config::absolute(path).map_err(Error::failed)?,
            ))),
            // Whether it will do is checked when it is mounted.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Directory(None)),
            // A dead mount also "exists", but says so differently.
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(Directory(None)),
            Err(error) => Err(Error::failed(format!(
                "cannot create the mount point {}: {error}",
                path.display()
            ))),
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Not empty means that somebody put something there, which is theirs.
            let _ = fs::remove_dir(path);
        }
    }
}

fn greeting(mountpoint: &Path, ledger: &Path, sampled: bool) -> String {
    let program = program();
    let tree = quoted(mountpoint.as_os_str());
    let origin = quoted(
        &[OsStr::new("sqlite://"), ledger.as_os_str()]
            .into_iter()
            .collect::<OsString>(),
    );
    let row = "app/flags name=new-checkout enabled=0";
    let commands = if sampled {
        [
            format!("ls {tree}/app/flags {tree}/edge/routes/eu"),
            format!("cat {tree}/app/flags/new-checkout/enabled"),
            format!("{program} put --origin {origin} {row}"),
            format!("{program} status {tree}"),
        ]
    } else {
        [
            format!("{program} apply --origin {origin} -f config.yaml"),
            format!("find {tree}"),
            format!("{program} put --origin {origin} FAMILY/TABLE FIELD=VALUE"),
            format!("{program} status {tree}"),
        ]
    };
    let mut text = format!(
        "Config is mounted on {}; Ctrl-C ends it. Try in another shell:\n\n",
        mountpoint.display()
    );
    for command in commands {
        text.push_str(&format!("  {command}\n"));
    }
    text.push('\n');
    text
}

/// How to call this program from a shell: by name if the shell would find it.
fn program() -> String {
    let own = std::env::current_exe().ok();
    let found = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|directory| directory.join("ctlfs"))
            .find(|file| file.is_file())
    });
    match (own, found) {
        (Some(own), Some(found)) if found.canonicalize().is_ok_and(|found| found == own) => {
            "ctlfs".into()
        }
        (Some(own), _) => quoted(own.as_os_str()),
        (None, _) => "ctlfs".into(),
    }
}

/// A word as a shell reads it.
fn quoted(word: &OsStr) -> String {
    let text = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+,@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_has_four_commands() {
        let text = greeting(Path::new("./my ctl"), Path::new("/s/ledger.db"), true);
        assert_eq!(
            text.lines().filter(|line| line.starts_with("  ")).count(),
            4
        );
        assert!(
            text.contains("cat './my ctl'/app/flags/new-checkout/enabled"),
            "{text}"
        );
        assert!(
            text.contains("put --origin sqlite:///s/ledger.db app/flags"),
            "{text}"
        );
    }

    #[test]
    fn the_state_is_beside_the_mount_point() {
        assert_eq!(
            beside(Path::new("./ctl/")).unwrap(),
            Path::new("./ctl.state")
        );
        assert_eq!(beside(Path::new("ctl")).unwrap(), Path::new("ctl.state"));
        assert!(beside(Path::new("..")).is_err());
    }
}
