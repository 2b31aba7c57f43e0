//! `ctlfs init`: creates the central tables.

use clap::Args;

use super::Error;
use super::origin::{OriginArgs, failed, say};

/// Create the ledger's tables in a database, once
///
/// The database itself must exist; for sqlite:// the file is created, readable by its owner only.
/// A file that another program filled is refused. Tables that are there stay as they are, those of a
/// ctlstore executive too, so running it again changes nothing.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InitArgs {
    #[command(flatten)]
    origin: OriginArgs,
}

const EXAMPLES: &str = "\
Examples:
  ctlfs init --origin mysql://admin@db:3306/ctldb --password-file /etc/ctlfs.pw
  ctlfs init --origin sqlite:///var/lib/app/ledger.db";

/// Runs the command.
pub fn run(args: InitArgs) -> Result<(), Error> {
    let mut executive = args.origin.executive()?;
    let made = executive.init().map_err(failed)?;
    let origin = executive.describe();
    if made.is_empty() {
        say(&format!(
            "{origin} is a ledger already; nothing was changed"
        ));
    } else {
        say(&format!("created {} in {origin}", made.join(", ")));
    }
    Ok(())
}
