//! What every command that talks to an origin takes: where it is, and the password.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::Error;
use crate::executive::{Executive, ExecutiveError};
use crate::ledger::{self, OriginUrl};
use crate::model::Seq;

/// Where the ledger is.
#[derive(Args)]
pub struct OriginArgs {
    /// The ledger: mysql://user:password@host:3306/database or sqlite:///path/ledger.db.
    #[arg(long, value_name = "URL", env = "CTLFS_ORIGIN", hide_env_values = true)]
    origin: String,
    /// A file that holds the origin's password.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    #[arg(env = "CTLFS_PASSWORD_FILE", hide_env_values = true)]
    password_file: Option<PathBuf>,
}

/// Leaves the URL out: it may hold a password.
impl fmt::Debug for OriginArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OriginArgs")
    }
}

impl OriginArgs {
    /// The origin, with its password.
    pub fn url(&self) -> Result<OriginUrl, Error> {
        let url: OriginUrl = self.origin.parse().map_err(Error::usage)?;
        match (&self.password_file, &url) {
            // A password file in the environment may be meant for another origin.
            (None, _) | (Some(_), OriginUrl::Sqlite(_)) => Ok(url),
            (Some(file), OriginUrl::MySql(_)) => {
                url.with_password_file(file).map_err(Error::failed)
            }
        }
    }

    /// The last sequence of the ledger; `None` when it is empty.
    pub(super) fn last_seq(&self) -> Result<Option<Seq>, Error> {
        let mut origin = ledger::open(&self.url()?).map_err(Error::failed)?;
        origin.last_seq().map_err(Error::failed)
    }

    /// A writer to the origin, not connected yet.
    pub fn executive(&self) -> Result<Executive, Error> {
        Executive::open(&self.url()?).map_err(failed)
    }
}

/// The error of a command that wrote to an origin.
pub(super) fn failed(error: ExecutiveError) -> Error {
    Error::failed(error)
}

/// Prints a command's result. A reader that has gone away is no failure of the command, which has
/// done its work.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
