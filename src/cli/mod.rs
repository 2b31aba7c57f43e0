//! The command line: one file per command, and what they share: help, errors and exit codes.

pub mod apply;
pub mod delete;
pub mod dev;
pub mod init;
pub mod mount;
pub mod origin;
pub mod put;
pub mod secret;
pub mod status;
pub mod unmount;
pub mod wait;
pub mod watch;
pub mod with_snapshot;

use std::ffi::OsString;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::daemon;

/// Why a command failed, and with which exit status.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was called wrongly: exit status 2.
    #[error("{0}")]
    Usage(String),
    /// It could not be done: exit status 1.
    #[error("{0}")]
    Failed(String),
    /// It has said so itself, and ends with this status.
    #[error("exit status {0}")]
    Exit(u8),
}

impl Error {
    /// A usage error that says `error`.
    pub fn usage(error: impl fmt::Display) -> Self {
        Error::Usage(error.to_string())
    }

    /// A failure that says `error`.
    pub fn failed(error: impl fmt::Display) -> Self {
        Error::Failed(error.to_string())
    }
}

impl From<daemon::Error> for Error {
    fn from(error: daemon::Error) -> Self {
        Error::failed(error)
    }
}

/// ctlfs mounts replicated configuration as files.
///
/// A central ledger (MySQL, MariaDB, or an SQLite file on one machine) holds every change of the
/// config. On each host 'ctlfs mount' replays the ledger into a local database and mounts that as
/// a directory tree, where any program reads config with open and read:
/// FAMILY/TABLE/KEY/FIELD is one value, FAMILY/TABLE/KEY/row.json the whole row.
///
/// Start with 'ctlfs dev': it runs all of it on this machine, with sample data to try.
#[derive(Parser)]
#[command(name = "ctlfs", version, verbatim_doc_comment, after_help = EXAMPLES)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  ctlfs dev --sample ./ctl                 everything on this machine; Ctrl-C ends it
  cat ctl/app/flags/new-checkout/enabled   read a value

  ctlfs init  --origin mysql://user@db:3306/ctldb --password-file pw
  ctlfs apply --origin mysql://user@db:3306/ctldb --password-file pw -f config.yaml
  ctlfs mount --origin mysql://user@db:3306/ctldb --password-file pw /ctl
  ctlfs status /ctl
  ctlfs watch /ctl/app                     tell of changes as they happen

'ctlfs COMMAND --help' explains a command. A wrong call exits with 2, any other failure with 1.";

#[derive(Subcommand)]
enum Command {
    Dev(dev::DevArgs),
    Init(init::InitArgs),
    Apply(apply::ApplyArgs),
    Put(put::PutArgs),
    Delete(delete::DeleteArgs),
    Mount(mount::MountArgs),
    Unmount(unmount::UnmountArgs),
    Status(status::StatusArgs),
    Wait(wait::WaitArgs),
    WithSnapshot(with_snapshot::WithSnapshotArgs),
    Watch(watch::WatchArgs),
}

/// Runs the command that the process was called with.
pub fn main() -> ExitCode {
    // `ctlfs status | head` ends quietly, as with any other tool. Daemons change this back.
    daemon::broken_pipe_kills(true);
    daemon::children_are_told();
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Err(error) = secret::hide(&args) {
        complain(&error);
    }
    let matches = match Cli::command().try_get_matches_from(&args) {
        Ok(matches) => matches,
        Err(error) => return usage(&error),
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.command {
        Command::Dev(args) => dev::run(args),
        Command::Init(args) => init::run(args),
        Command::Apply(args) => apply::run(args),
        Command::Put(args) => put::run(args),
        Command::Delete(args) => delete::run(args),
        Command::Mount(args) => mount::run(args),
        Command::Unmount(args) => unmount::run(args),
        Command::Status(args) => status::run(args),
        Command::Wait(args) => wait::run(args),
        Command::WithSnapshot(args) => with_snapshot::run(args),
        Command::Watch(args) => watch::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Exit(code)) => ExitCode::from(code),
        Err(Error::Usage(text)) => {
            complain(&format!("{text}\nTry 'ctlfs --help'."));
            ExitCode::from(2)
        }
        Err(Error::Failed(text)) => {
            complain(&text);
            ExitCode::FAILURE
        }
    }
}

fn complain(text: &dyn fmt::Display) {
    let _ = writeln!(std::io::stderr(), "ctlfs: {text}");
}

/// Prints what clap has to say: help and version are answers, the rest is a wrong call.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    // clap quotes what it does not understand, which can be a misplaced URL.
    let text = secret::redact(&error.render().to_string());
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let _ = write!(std::io::stderr(), "ctlfs: {text}");
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }
}
